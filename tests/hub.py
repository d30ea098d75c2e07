"""A loopback hub: serves folders to the real `huggingface_hub` and `datasets` clients, with faults on demand.

    with Hub(folder) as hub:
        hub.add("openai/clip-vit-base-patch32", {"config.json": b"{}", "model.safetensors": path})
        hub.add("owner/photos", {"data/train-00000-of-00001.parquet": path}, kind="datasets")
        hub.fault("model.safetensors", Fault(status=503, times=2))
        subprocess.run(command, env=os.environ | hub.env(cache_folder))      # what a user's command does

The clients read their environment when they are imported: start a process with `hub.env(...)`, or in a test point
this process's client at the hub with `hub.here(monkeypatch, cache_folder)`.
`hub.requests` lists (method, path) as they came. Files that the real hub keeps in LFS (`LFS`) are answered with a
redirect to another host name, as there; X-Linked-Etag is their sha256.
"""

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".pt", ".bin", ".npy", ".parquet", ".tar", ".zip", ".jpg", ".png")
KINDS = {"models": "", "datasets": "datasets/"}
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+(?:/[^/]+)??)"
    r"(?:/(?P<verb>revision|tree|paths-info|refs)(?:/(?P<revision>[^/]+))?(?:/(?P<path>.*))?)?"
)


@dataclass
class Fault:
    """What happens to the next `times` requests of a file (None: to all of them).

    status, code: answered instead of the file (X-Error-Code). keep: share of the body sent before the line is cut.
    delay: seconds before each of four pieces of the body. sha: announced instead of the true sha256.
    """

    status: int | None = None
    code: str | None = None
    keep: float = 1.0
    delay: float = 0.0
    sha: str | None = None
    times: int | None = None
    methods: tuple[str, ...] = ("HEAD", "GET")


class Hub:
    """Serves `<root>/models/<owner>/<name>/...` and `<root>/datasets/<owner>/<name>/...` on 127.0.0.1."""

    def __init__(self, root: Path):
        self.root, self.requests, self._faults = Path(root), [], {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def env(self, cache: Path) -> dict[str, str]:
        """Environment of a process that sees this hub only, with its caches under `cache`."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_CACHE": str(Path(cache) / "hub"),
            "HF_DATASETS_CACHE": str(Path(cache) / "datasets"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
        }  # fmt: skip

    def here(self, monkeypatch, cache: Path, offline: bool = False) -> None:
        """Point the client that this process has imported at this hub, with its cache in `cache`."""
        from huggingface_hub import constants

        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        changed = {"ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache),
                   "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_PROGRESS_BARS": True}  # fmt: skip
        for name, value in changed.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1,localhost")

    def add(self, repo: str, files: Mapping[str, bytes | Path], kind: str = "models") -> Path:
        """Put files (bytes, or paths to copy) into a repository, a new one or one that is there."""
        for name, content in files.items():
            path = self.root / kind / repo / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copyfile(content, path)
        return self.root / kind / repo

    def fault(self, filename: str, *faults: Fault) -> None:
        """Let the requests for a file (path in its repository, or its last name) meet these faults, one by one."""
        self._faults[filename] = list(faults)

    def next_fault(self, path: str, method: str) -> Fault:
        """The fault that this request meets; counts it."""
        queue = self._faults.get(path) or self._faults.get(path.rpartition("/")[2]) or []
        for fault in queue:
            if method in fault.methods and fault.times != 0:
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return Fault()

    def asked(self, method: str, part: str = "") -> list[str]:
        """Paths asked for by this method that contain `part`."""
        return [path for each, path in self.requests if each == method and part in path]


def commit(folder: Path) -> str:
    """A commit hash that changes with the files of a repository."""
    listed = "\n".join(f"{name} {path.stat().st_size} {path.stat().st_mtime_ns}" for name, path in files_of(folder))
    return hashlib.sha1(listed.encode()).hexdigest()


def files_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name in the repository, path), sorted."""
    return ((path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file())


def git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(name: str, path: Path) -> dict:
    """One line of a listing."""
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    content = path.read_bytes()
    listed = {"type": "file", "oid": git_sha(content), "size": len(content), "path": name}
    if name.endswith(LFS):
        listed["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return listed


class Handler(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that the clients use for reading."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def route(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append((self.command, path))
        if path.startswith("/cdn/"):
            name = Path(path).relative_to("/cdn")
            self.send_file(self.hub.root / name, self.hub.next_fault(Path(*name.parts[3:]).as_posix(), self.command))
        elif found := RESOLVE.fullmatch(path):
            self.resolve("datasets" if found["kind"] else "models", found["repo"], found["revision"], found["path"])
        elif found := API.fullmatch(path):
            self.api(found, parse_qs(url.query), body)
        else:
            self.refuse(404)

    def repository(self, kind: str, repo: str, revision: str | None) -> Path | None:
        """The folder; None, and the client is told, if there is no such repository or revision."""
        folder = self.hub.root / kind / repo
        if not folder.is_dir():
            self.refuse(401, "RepoNotFound")  # the real hub does not tell strangers from private ones
        elif revision not in (None, "main", commit(folder)):
            self.refuse(404, "RevisionNotFound")
        else:
            return folder
        return None

    def resolve(self, kind: str, repo: str, revision: str, path: str) -> None:
        folder = self.repository(kind, repo, revision)
        if folder is None:
            return
        redirected = path.endswith(LFS) and (folder / path).is_file()
        fault = self.hub.next_fault(path, self.command) if not redirected or self.command == "HEAD" else Fault()
        if fault.status is not None:
            return self.refuse(fault.status, fault.code)
        if not (folder / path).is_file():
            return self.refuse(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit(folder), "Accept-Ranges": "bytes"}
        if not redirected:
            headers["ETag"] = f'"{git_sha((folder / path).read_bytes())}"'
            return self.send_file(folder / path, fault, headers)
        listed = entry(path, folder / path)["lfs"]
        headers |= {
            "X-Linked-Etag": f'"{fault.sha or listed["oid"]}"', "X-Linked-Size": str(listed["size"]),
            "Location": f"http://localhost:{self.hub.port}/cdn/{kind}/{repo}/{path}",
        }  # fmt: skip
        self.answer(302, b"", headers)

    def api(self, found: re.Match, query: Mapping[str, list[str]], body: str) -> None:
        folder = self.repository(found["kind"], found["repo"], found["revision"])
        if folder is None:
            return
        names = dict(files_of(folder))
        if found["verb"] == "refs":
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit(folder)}
            return self.reply({"branches": [branch], "tags": [], "converts": []})
        if found["verb"] == "tree":
            return self.reply(self.tree(folder, found["path"] or "", query.get("recursive", ["false"])[0].lower()))
        if found["verb"] == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            return self.reply([entry(name, folder / name) for name in wanted if (folder / name).exists()])
        self.reply(
            {
                "_id": "0", "id": found["repo"], "sha": commit(folder), "private": False, "gated": False, "tags": [],
                "downloads": 0, "likes": 0, "lastModified": "2024-01-01T00:00:00.000Z", "disabled": False,
                "createdAt": "2024-01-01T00:00:00.000Z", "siblings": [{"rfilename": name} for name in names],
            }
        )  # fmt: skip

    def tree(self, folder: Path, below: str, recursive: str) -> list[dict]:
        start = folder / below
        paths = start.rglob("*") if recursive in ("true", "1") else start.glob("*")
        return [entry(path.relative_to(folder).as_posix(), path) for path in sorted(paths)]

    def send_file(self, path: Path, fault: Fault, headers: Mapping[str, str] | None = None) -> None:
        if fault.status is not None:
            return self.refuse(fault.status, fault.code)
        content, status, more = path.read_bytes(), 200, dict(headers or {})
        size, span = len(content), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is not None:
            first, last = int(span[1]), int(span[2] or size - 1)
            if first >= size:
                return self.refuse(416)
            content, status = content[first : last + 1], 206
            more["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{size}"
        self.answer(status, content, more, fault)

    def reply(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str | None = None) -> None:
        self.answer(status, b"", {} if code is None else {"X-Error-Code": code, "X-Error-Message": code})

    def answer(self, status: int, content: bytes, headers: Mapping[str, str], fault: Fault | None = None) -> None:
        fault = Fault() if fault is None else fault
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = content[: int(len(content) * fault.keep)]
        step = max(1, -(-len(sent) // 4)) if fault.delay else max(1, len(sent))
        for start in range(0, len(sent), step):
            time.sleep(fault.delay)
            self.wfile.write(sent[start : start + step])
            self.wfile.flush()
        self.close_connection = self.close_connection or len(sent) < len(content)
