"""Experiments elsewhere: `python -m launchers.sweeps check|wandb experiment=NAME [overrides]`."""

import argparse
from collections.abc import Sequence

from launchers.results.command import one_paragraph
from launchers.sweeps import agents
from launchers.sweeps.axes import read
from launchers.sweeps.check import check
from merging.files import write_text


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 1 with one paragraph where the experiment cannot run."""
    parser = argparse.ArgumentParser("python -m launchers.sweeps", description="Check an experiment or send it away.")
    commands = parser.add_subparsers(required=True)
    checking = commands.add_parser("check", help="say what would run; nothing runs")
    checking.set_defaults(run=show)
    writing = commands.add_parser("wandb", help="write a W&B sweep; its agents run `duet`")
    writing.set_defaults(run=write)
    writing.add_argument("--file", help="where to write it (<experiment>.sweep.yaml)")
    writing.add_argument("--method", choices=agents.METHODS, default="grid", help="how W&B chooses (grid)")
    writing.add_argument("--register", action="store_true", help="also make it known to the server")
    for command in (checking, writing):
        command.add_argument("overrides", nargs="+", help="experiment=NAME and any overrides, as for duet")
    options = parser.parse_args(arguments)
    with one_paragraph():
        options.run(options)


def show(options: argparse.Namespace) -> None:
    """The axes and how many cells they make."""
    sweep = read(options.overrides)
    cells = check(sweep)
    for key, values in sweep.axes.items():
        print(f"{key}: {' to '.join(values) if key in sweep.intervals else ', '.join(values)}")
    print("every key exists and every value builds; a search chooses" if sweep.intervals else f"{cells} cells")


def write(options: argparse.Namespace) -> None:
    """The YAML file and, on request, the registered sweep."""
    sweep = read(agents.tracked(options.overrides))
    defined = agents.definition(sweep, options.method)
    path = write_text(options.file or f"{defined['name']}.sweep.yaml", agents.text(sweep, defined))
    print(f"wrote {path}; `wandb sweep {path}` registers it")
    if options.register:
        print(f"registered; run `wandb agent {agents.register(defined)}` on any number of machines")


if __name__ == "__main__":
    main()
