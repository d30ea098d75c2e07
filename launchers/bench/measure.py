"""What a fresh Python process costs, and how that is printed."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

MIB = 1 << 20


class Measured(NamedTuple):
    """One process from start to exit; seconds and bytes."""

    wall: float
    work: float  # from opening the files to the merge on disk, imports left out
    cpu: float
    peak: int  # resident memory, with every page of mapped files that was touched


def measure(call: str, *arguments: object) -> Measured:
    """`module:function` on the arguments as strings in a fresh process; it returns the seconds of its work.

    The caller must not import torch: on Linux the peak memory of a child starts from that of its parent.
    Raises RuntimeError if the process fails.
    """
    module, function = call.split(":")
    code = f"import sys; from {module} import {function}; print(); print({function}(*sys.argv[1:]))"
    measured, printed = spawned([sys.executable, "-c", code, *map(str, arguments)])
    return measured._replace(work=json.loads(printed.splitlines()[-1]))


def spawned(command: Sequence[str]) -> tuple[Measured, str]:
    """What a command costs, and what it prints. Raises RuntimeError if it fails."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with exit status {process.returncode}")
    return Measured(wall, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024), printed


def table(measured: Sequence[tuple[str, Measured]]) -> str:
    """Markdown; the ratios compare the work, without start-up, with that of the first row, the floor."""
    heads = ("", "seconds", "of it merge + save", "times the floor", "CPU seconds", "peak memory, MiB")
    lines = [f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for title, row in measured:
        ratio = f"{row.work / measured[0][1].work:.2f}"
        cells = (title, f"{row.wall:.2f}", f"{row.work:.2f}", ratio, f"{row.cpu:.2f}", f"{row.peak / MIB:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores and torch version."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {os.cpu_count()} cores, torch {version('torch')}, Python {platform.python_version()}"


def report(options: argparse.Namespace, section: str, text: str) -> None:
    """Print the table; also put it into the markdown file of --output, where one is named."""
    print(text)
    if options.output is not None:
        write_section(options.output, section, text)


def write_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers of `name` in a markdown file, at its end if it has none."""
    opening, closing = f"<!-- bench {name} -->", f"<!-- end of bench {name} -->"
    page = path.read_text() if path.exists() else "# Performance\n"
    before, _, rest = page.partition(opening)
    after = rest.partition(closing)[2] or "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before.rstrip()}\n\n{opening}\n{text}\n{closing}{after}")
