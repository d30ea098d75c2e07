"""Benchmarks: `python -m launchers.bench forward|gpu|merge|llm|factor|clip` prints a markdown table."""

import argparse
from collections.abc import Sequence
from importlib import import_module

from launchers.bench import BENCHMARKS


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m launchers.bench", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark["help"])
        for option, settings in benchmark["options"].items():
            is_number = isinstance(settings.get("default"), int | float)
            command.add_argument(f"--{option}", **settings | ({"type": type(settings["default"])} if is_number else {}))
    options = parser.parse_args(arguments)
    import_module(f"launchers.bench.{options.benchmark}").main(options)


if __name__ == "__main__":
    main()
