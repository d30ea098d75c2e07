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

BEAT, SILENT = 15.0, 120.0  # seconds: an owner touches its claim every BEAT; after SILENT it counts as dead


class Taken(Exception):
    """Another process computes this cell."""


@contextlib.contextmanager
def claim(folder: str | Path, run_id: str) -> Iterator[None]:
    """Hold `<folder>/<run_id>.claim` meanwhile. Raises Taken, saying by whom, where a living process holds it."""
    path = Path(folder) / f"{run_id}.claim"
    path.parent.mkdir(parents=True, exist_ok=True)
    _take(path)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        path.unlink(missing_ok=True)


def owner(folder: str | Path, run_id: str) -> str | None:
    """Who computes the cell now, such as "node7, process 4711, since 2026-01-01 12:00 UTC"; None for nobody."""
    path = Path(folder) / f"{run_id}.claim"
    try:
        stat, found = path.stat(), json.loads(path.read_text())
        host, space, pid, since = found["host"], found["space"], int(found["pid"]), found["since"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # its owner is just writing it, or died while it did
        return None if _age(path) > BEAT else "a process that has just started"
    if (host, space) == (socket.gethostname(), _space()) and not _alive(pid):
        return None
    silent = _now(path.parent) - stat.st_mtime
    return None if silent > SILENT else f"{host}, process {pid}, since {since}"


def _take(path: Path) -> None:
    with _lock(path.parent):
        holder = owner(path.parent, path.stem)
        if holder is not None:
            raise Taken(holder)
        since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        content = {"host": socket.gethostname(), "space": _space(), "pid": os.getpid(), "since": since}
        partial.write_text(json.dumps(content))
        os.replace(partial, path)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process of all machines at a time (POSIX locks, which network file systems pass on)."""
    with (folder / ".claims.lock").open("a") as file, _HERE:
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
    probe = folder / f".clock.{os.getpid()}.{threading.get_ident()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _space() -> str:
    """Where process numbers mean the same: containers may share a host's name and not its processes."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
