"""What a fresh process or a computation costs, and the table that says so."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from launchers.bench import TABLES, TASKS

MIB = 1 << 20


class Process(NamedTuple):
    """One process from start to exit: seconds, bytes, and what it printed last, as JSON."""

    wall: float
    cpu: float
    peak: int  # resident memory, with every page of mapped files that was touched
    output: Any = None


def measured(title: str, command: Sequence[str]) -> Process:
    """What a command costs, also logged under its title.

    On Linux the peak memory of a child starts from that of its parent, which therefore holds no large tensor. Raises
    RuntimeError if the command fails.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with exit status {process.returncode}")
    cost = Process(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, printed)
    print(f"{title}: {wall:.2f} s, {cost.cpu:.2f} CPU s, {cost.peak / MIB:.0f} MiB", file=sys.stderr)
    return cost


def called(title: str, call: str, *arguments: object) -> Process:
    """As `measured`, for `module:function` on the arguments as strings, which returns something JSON has."""
    module, function = call.split(":")
    code = f"import json, sys; from {module} import {function} as f; print(); print(json.dumps(f(*sys.argv[1:])))"
    cost = measured(title, [sys.executable, "-c", code, *map(str, arguments)])
    return cost._replace(output=json.loads(cost.output.splitlines()[-1]))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until it is done, on a GPU too, and the result."""
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def tensor_bytes(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of the tensors that `run` makes on the CPU: most at once, and left when it has returned its result.

    What is left without the result itself is what autograd keeps for the gradients.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    alive = [0, *accumulate(size for _, size in changes)]
    return max(alive), alive[-1] - (result.nbytes if isinstance(result, torch.Tensor) else 0)


def report(options: argparse.Namespace, name: str, rows: Iterable[Sequence[str]], **facts: object) -> None:
    """Print a table of benchmarks.yaml as markdown, with the machine and the date."""
    caption, columns = TABLES[name]["caption"], TABLES[name]["columns"]
    caption = caption.format(**vars(options), tasks=TASKS, **facts)
    print(f"{caption} {machine()}; {time.strftime('%Y-%m-%d', time.gmtime())}.\n")
    for line in (columns, ["---", *["---:"] * (len(columns) - 1)], *rows):
        print(f"| {' | '.join(line)} |")


def machine() -> str:
    """Processor, cores and versions."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {os.cpu_count()} cores, torch {version('torch')}, Python {platform.python_version()}"
