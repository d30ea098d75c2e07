"""Who computes a cell: the same command may run several times on one results folder, and no cell is scored twice."""

import contextlib
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from merging.errors import UserError

LOCK = ".claims.lock"  # in every folder with claims; stays there
BEAT, SILENT = 15.0, 120.0  # seconds: an owner touches its claim every BEAT; after SILENT it counts as dead


class Taken(Exception):
    """Another process computes this cell."""


@contextlib.contextmanager
def claim(folder: str | Path, run_id: str, about: str = "") -> Iterator[None]:
    """Hold `<folder>/<run_id>.claim` meanwhile, which says what it is `about`.

    Raises Taken, saying by whom, where a living process holds it.

    Raises UserError where nothing can be written.
    """
    path = Path(folder) / f"{run_id}.claim"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _take(path, about)
    except OSError as error:
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
    path, here = Path(folder) / f"{run_id}.claim", _here()
    try:
        touched = path.stat().st_mtime
        silence = clock(path.parent) - touched
        claim = {"job": "", "life": 0} | json.loads(path.read_text())
        ended = all(claim[name] == here[name] for name in ("host", "space")) and not _alive(claim["pid"])
        job = f"SLURM job {claim['job']}, " if claim["job"] else ""
        name = f"{claim['host']}, {job}process {claim['pid']}, since {claim['since']}"
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # damaged by a crash of its machine
        return None if silence > BEAT else "a process that has just started"
    # SLURM starts a job again when the earlier life has ended
    restarted = claim["job"] and claim["job"] == here["job"] and claim["life"] < here["life"]
    return None if ended or restarted or silence > SILENT else name


def about(folder: Path, run_id: str) -> str:
    """What a claim is about; the run's id where it does not say."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((folder / f"{run_id}.claim").read_text()).get("about") or run_id
    return run_id


def clock(folder: Path) -> float:
    """The time by the folder's own clock, which may be another machine's."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_mtime
    except OSError:
        return time.time()


def _take(path: Path, about: str) -> None:
    with (path.parent / LOCK).open("a") as lock:  # closing it unlocks it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (holder := owner(path.parent, path.stem)) is not None:
            raise Taken(holder)
        partial = path.with_name(".claims.new")  # only who holds the lock writes it; a killed one leaves no litter
        since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        partial.write_text(json.dumps(_here() | {"since": since, "about": about}))
        os.replace(partial, path)


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _here() -> dict[str, Any]:
    """This process: containers may share a host's name and not its process numbers, which mean the same in a `space`.

    job: of SLURM, such as "12_3" in an array. life: how often that job was put back into the queue.
    """
    space = Path("/proc/self/ns/pid")
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return {
        "host": socket.gethostname(),
        "space": os.readlink(space) if space.is_symlink() else "",
        "pid": os.getpid(),
        "job": f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", ""),
        "life": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
