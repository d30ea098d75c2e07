"""`duet` in children of one warm process: a start costs next to nothing, so that many of them may be killed."""

import contextlib
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

from processes import interruptible

KINDS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


class Warm:
    """Starts children of a server in a process of its own; the client's threads are not forked."""

    def __init__(self, server):
        self._server = server
        assert self._answer() == "ready"

    def start(self, command, cwd, log, watched=(), deadly=None, kinds=KINDS):
        """The process number of a child that runs the console script `command`, its output added to the file `log`.

        deadly: the child kills itself (SIGKILL) just before its change number `deadly` of these kinds (audit events)
        to files in the `watched` folders.
        """
        return self._ask(command=list(map(str, command)), cwd=str(cwd), log=str(log),
                         watched=list(map(str, watched)), deadly=deadly, kinds=list(kinds))  # fmt: skip

    def wait(self, child):
        """The exit status of a child, negative for a signal, once it has ended."""
        return self._ask(wait=child)

    def _ask(self, **request):
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return self._answer()

    def _answer(self):
        line = self._server.stdout.readline()
        assert line, "the warm process ended"
        return json.loads(line)


@contextlib.contextmanager
def warm(**environment):
    """A server for as long as it is needed; its children end with it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    with interruptible([sys.executable, __file__], env=told, **pipes) as server:
        yield Warm(server)


def serve():
    """Forks a child for each line of stdin, or waits for one."""
    import torch
    from hydra.plugins.sweeper import Sweeper

    from launchers.cells import code_version

    for package in ("merging", "tasks", "launchers"):
        for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if not found.name.endswith(("__main__", "bench", "bench.clip", "bench.forward")):
                importlib.import_module(found.name)
    torch.set_num_threads(1)
    code_version()  # the same in every row, whatever happens to the checkout meanwhile
    Sweeper.validate_batch_is_legal = lambda *_: None  # composes every job once more, in advance
    print('"ready"', flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork() or child(**request)
        print(json.dumps(answer), flush=True)


def child(command, cwd, log, watched, deadly, kinds):
    from launchers import run

    os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = command
    changes = watch(tuple(watched), deadly, kinds)
    try:
        run.main()
    except SystemExit as stop:
        print(f"exit {stop.code}, {len(changes)} changes", file=sys.stderr, flush=True)
        os._exit(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    os._exit(0)


def watch(folders, deadly, kinds):
    """The changes to files below the folders, as they come; before number `deadly` this process dies."""
    seen = []

    def hook(event, arguments):
        if event in kinds and (event != "open" or opens_to_write(*arguments)):
            path = arguments[0]
            if isinstance(path, (str, Path)) and str(path).startswith(folders):
                seen.append((event, str(path)))
                if len(seen) == deadly:
                    os.kill(os.getpid(), signal.SIGKILL)

    if folders:
        sys.addaudithook(hook)
    return seen


def opens_to_write(path, mode, flags):
    return bool(flags & (os.O_WRONLY | os.O_RDWR))


if __name__ == "__main__":
    serve()
