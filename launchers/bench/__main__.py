"""Benchmarks: `python -m launchers.bench forward|gpu|merge|factor|clip` prints a markdown table."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from launchers.bench import clip, factor, forward, gpu, merge

BENCHMARKS = {"forward": forward, "gpu": gpu, "merge": merge, "factor": factor, "clip": clip}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m launchers.bench", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.HELP)
        benchmark.add_arguments(command)
        command.add_argument("--output", type=Path, help="markdown file that gets the table: docs/performance.md")
    options = parser.parse_args(arguments)
    if options.output is not None and options.output.suffix != ".md":
        parser.error(f"--output={options.output} is no markdown file (.md): the table is written into it")
    BENCHMARKS[options.benchmark].main(options)


if __name__ == "__main__":
    main()
