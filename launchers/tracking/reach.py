"""Whether the W&B server can be used now, found out in a few seconds; and what is still to be sent when a run ends."""

import atexit
import json
import logging
import netrc
import os
import queue
import ssl
import threading
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Literal, get_args
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

Mode = Literal["auto", "online", "offline", "disabled"]
PATIENCE = 3.0  # seconds that a job may lose to the server at a time
QUIET = 600.0  # seconds for which a server that did not answer is left alone
log = logging.getLogger(__name__)
_SILENT: dict[str, tuple[float, str]] = {}  # server -> until when, and why


def default_mode() -> str:
    """WANDB_MODE if set; else online with an API key, a token or a login for the server; else offline."""
    if (told := os.environ.get("WANDB_MODE", "")) in get_args(Mode)[1:]:
        return told
    if told:
        log.warning("WANDB_MODE=%s is not known here and ignored. Known: %s.", told, ", ".join(get_args(Mode)[1:]))
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    file = Path(os.environ.get("NETRC", Path.home() / ("_netrc" if os.name == "nt" else ".netrc")))
    try:  # `wandb login` writes there
        return "online" if (urlparse(server()).hostname or "") in netrc.netrc(file).hosts else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def server() -> str:
    """The address of the W&B server."""
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")


def silence() -> str | None:
    """Why the server cannot be used now, None if it answers. Takes PATIENCE at most, whatever hangs."""
    until, reason = _SILENT.get(server(), (0.0, ""))
    if time.monotonic() < until:
        return reason
    told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: told.put(_asked(server())), daemon=True).start()  # looking up a name has no limit
    try:
        found = told.get(timeout=PATIENCE)
    except queue.Empty:
        found = f"no answer within {PATIENCE:g} s"
    if found is not None:
        give_up(found)
    return found


def give_up(reason: str) -> None:
    """Leave the server alone for a while."""
    _SILENT[server()] = (time.monotonic() + QUIET, reason)


def _asked(url: str) -> str | None:
    """What went wrong with the simplest question; a refusal is an answer, a failure is asked again once."""
    question = json.dumps({"operationName": "Viewer", "query": "query Viewer { viewer { id } }"}).encode()
    found = None
    for pause in (0.0, 0.5):
        time.sleep(pause)
        try:
            request = Request(f"{url}/graphql", question, {"Content-Type": "application/json"})
            urlopen(request, timeout=PATIENCE).close()
            return None
        except HTTPError as error:
            if error.code < 500:
                return None
            found = f"HTTP {error.code}"
        except URLError as error:
            if isinstance(error.reason, ssl.SSLError):
                return None  # somebody is there; W&B's own client knows other certificates
            found = str(error.reason)
        except (OSError, HTTPException, ValueError) as error:
            found = f"{type(error).__name__}: {error}"
    return found


class Rest:
    """What is still to be sent of a run: done in a thread, for which a job waits a little and the process longer."""

    def __init__(self, send: Callable[[], object], limit: float, cut_off: Callable[[], object]) -> None:
        """`send` may take `limit` seconds from now; `cut_off` is called where the process ends without it."""
        self.until, self.cut_off = time.monotonic() + limit, cut_off
        self.thread = threading.Thread(target=send, daemon=True)

    def start(self) -> None:
        """Send, and go on without waiting where it takes longer than PATIENCE."""
        self.thread.start()
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            log.info("W&B takes its time: the rest of the run is sent meanwhile")
            _RESTS.append(self)
            atexit.unregister(finish_rests)
            atexit.register(finish_rests)  # runs before W&B's own, which was registered when its first run began


_RESTS: list[Rest] = []


def finish_rests() -> None:
    """Wait for what is still being sent, while the server answers and its time is not over."""
    while _RESTS:
        rest = _RESTS.pop()
        while rest.thread.is_alive() and time.monotonic() < rest.until and silence() is None:
            rest.thread.join(1.0)
        if rest.thread.is_alive():
            rest.cut_off()
