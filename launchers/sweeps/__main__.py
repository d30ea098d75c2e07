"""Experiments elsewhere: `python -m launchers.sweeps check|wandb experiment=NAME [overrides]`."""

import argparse
import sys
from collections.abc import Sequence

from hydra.errors import HydraException

from launchers.sweeps import agents
from launchers.sweeps.axes import read
from launchers.sweeps.check import check
from merging.errors import UserError
from merging.files import write_text


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Exits 1 with one paragraph where the experiment cannot run."""
    chosen = parse(arguments)
    try:
        chosen.run(chosen)
    except (UserError, HydraException) as error:
        sys.exit(f"error: {error}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What is to be done with which sweep."""
    parser = argparse.ArgumentParser("python -m launchers.sweeps", description="Check an experiment or send it away.")
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("check", help="say what would run; nothing runs")
    first.set_defaults(run=show)
    second = commands.add_parser("wandb", help="write a W&B sweep; its agents run `duet`")
    second.set_defaults(run=write)
    second.add_argument("--file", help="where to write it (<experiment>.sweep.yaml)")
    second.add_argument("--method", choices=agents.METHODS, default="grid", help="how W&B chooses (grid)")
    second.add_argument("--register", action="store_true", help="also make it known to the server")
    for command in (first, second):
        command.add_argument("overrides", nargs="+", help="experiment=NAME and any overrides, as for duet")
    return parser.parse_args(arguments)


def show(chosen: argparse.Namespace) -> None:
    """The axes and how many cells they make."""
    sweep = read(chosen.overrides)
    cells = check(sweep)
    for key, values in sweep.axes.items():
        print(f"{key}: {' to '.join(values) if key in sweep.intervals else ', '.join(values)}")
    print("every key exists and every value builds; a search chooses" if sweep.intervals else f"{cells} cells")


def write(chosen: argparse.Namespace) -> None:
    """The YAML file and, if wanted, the registered sweep."""
    sweep = read(agents.tracked(chosen.overrides))
    made = agents.definition(sweep, chosen.method)
    path = write_text(chosen.file or f"{made['name']}.sweep.yaml", agents.text(sweep, made))
    print(f"wrote {path}; `wandb sweep {path}` registers it")
    if chosen.register:
        print(f"registered; run `wandb agent {agents.register(made)}` on any number of machines")


if __name__ == "__main__":
    main()
