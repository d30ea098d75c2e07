"""Who computes a cell: the same command may run several times on one results folder, and no cell is scored twice."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

LOCK = ".claims.lock"  # in every folder with claims; stays there
BEAT, SILENT = 15.0, 120.0  # seconds: an owner touches its claim every BEAT; after SILENT it counts as dead


class Taken(Exception):
    """Another process computes this cell."""


@contextlib.contextmanager
def claim(folder: str | Path, run_id: str) -> Iterator[None]:
    """Hold `<folder>/<run_id>.claim` meanwhile. Raises Taken, saying by whom, where a living process holds it.

    Raises UserError where nothing can be written.
    """
    path = Path(folder) / f"{run_id}.claim"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _take(path)
    except OSError as error:
        from merging.errors import UserError  # late: the package takes seconds to import

        raise UserError(
            f"Cannot claim {path.stem} in {path.parent}: {error.strerror or error}. Free some space or name an output "
            "folder you may write to, then run the same command again."
        ) from error
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        path.unlink(missing_ok=True)


def release(folder: str | Path, job: str) -> None:
    """Remove the claims of a SLURM job that the scheduler knows to be dead."""
    for path in Path(folder).glob("*.claim"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(path.read_text()).get("job") == job:
                path.unlink()


def owner(folder: str | Path, run_id: str) -> str | None:
    """Who computes the cell now, such as "node7, process 4711, since 2026-01-01 12:00 UTC"; None for nobody."""
    path = Path(folder) / f"{run_id}.claim"
    try:
        stat, content = path.stat(), json.loads(path.read_text())
        host, space, pid, since = content["host"], content["space"], int(content["pid"]), content["since"]
        job, life = content.get("job", ""), int(content.get("life", 0))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # its owner is just writing it, or died while it did
        return None if _age(path) > BEAT else "a process that has just started"
    if (host, space) == (socket.gethostname(), _space()) and not _alive(pid):
        return None
    if job and job == _job() and life < _life():  # SLURM starts a job again when the earlier life has ended
        return None
    silent = _now(path.parent) - stat.st_mtime
    return None if silent > SILENT else f"{host}, {f'SLURM job {job}, ' * bool(job)}process {pid}, since {since}"


def _take(path: Path) -> None:
    with _lock(path.parent):
        holder = owner(path.parent, path.stem)
        if holder is not None:
            raise Taken(holder)
        since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        partial = path.with_name(".claims.new")  # only who holds the lock writes it; a killed one leaves no litter
        here = {"host": socket.gethostname(), "space": _space(), "pid": os.getpid()}
        content = {**here, "job": _job(), "life": _life(), "since": since}
        partial.write_text(json.dumps(content))
        os.replace(partial, path)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process of all machines at a time (POSIX locks, which network file systems pass on)."""
    with (folder / LOCK).open("a") as file, _HERE:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield  # closing the file unlocks it


_HERE = threading.Lock()  # POSIX locks do not keep threads of one process apart


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _age(path: Path) -> float:
    try:
        return _now(path.parent) - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _now(folder: Path) -> float:
    """The time by the folder's own clock, which may be another machine's."""
    probe = folder / LOCK
    try:
        probe.touch()  # sets the time without opening it, which would end a lock that this process holds
        return probe.stat().st_mtime
    except OSError:
        return time.time()


def _space() -> str:
    """Where process numbers mean the same: containers may share a host's name and not its processes."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _job() -> str:
    """The SLURM job of this process, such as "12_3" in an array, or nothing."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _life() -> int:
    """How often that job was put back into the queue: after a time-out, a preemption, the end of a node."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
