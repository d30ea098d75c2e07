"""A server on this machine that answers what `wandb sweep`, `wandb agent` and an online run ask, and remembers it."""

import contextlib
import gzip
import itertools
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

# The client goes on without these; artifacts, such as the table, are not taken.
TOLERATED = {
    "ArtifactType",
    "CreateArtifact",
    "OrganizationCoreWeaveOrganizationID",
    "ServerFeaturesQuery",
    "CreateRunFiles",
}


class Server:
    """Use in a `with` block. `sweeps` holds definitions, `runs` what was logged, `unknown` what had no answer.

    `fault` may be set at any time: "hangs" accepts and never answers, "fails" answers 500 to everything, "opens
    nothing" hangs unless it is only asked who it is.
    """

    def __init__(self, fault=None):
        self.lock, self.sweeps, self.agents, self.runs, self.unknown = threading.Lock(), {}, {}, {}, set()
        self.fault, self.asked, self._connections, self._over = fault, 0, set(), threading.Event()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"state": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Shut down at once, open connections too; from now on the port refuses."""
        self.fault = "gone"
        self._over.set()
        self._http.shutdown()
        self._http.server_close()
        for connection in tuple(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def environment(self):
        url = f"http://127.0.0.1:{self._http.server_address[1]}"
        return {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "WANDB_SILENT": "true", "NO_PROXY": "127.0.0.1"}

    def answer(self, operation, variables):
        method = getattr(self, operation, None) if operation[:1].isupper() else None
        if method is None:
            self.unknown |= {operation} - TOLERATED
            return {"errors": [{"message": f"not known here: {operation}"}]}
        return {"data": method(variables)}

    def Viewer(self, _):
        nobody = {"edges": []}
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "email": "", "admin": False,
                           "teams": nobody, "apiKeys": nobody}}  # fmt: skip

    def UpsertSweep(self, told):
        name, config = f"sweep{len(self.sweeps)}", yaml.safe_load(told["config"])
        self.sweeps[name] = {
            "config": config,
            "text": told["config"],
            "left": list(grid(config["parameters"])),
            "sent": 0,
        }
        return {"upsertSweep": {"sweep": {"name": name, "project": project(told)}, "configValidationWarnings": []}}

    def SweepWithRuns(self, told):
        sweep = self.sweeps[told["sweep"]]
        found = {"id": "x", "name": told["sweep"], "method": "grid", "state": "RUNNING", "config": sweep["text"],
                 "createdAt": "2020-01-01T00:00:00", "runs": {"edges": []}}  # fmt: skip
        return {"project": {"sweep": found}}

    def CreateAgent(self, told):
        agent = f"agent{len(self.agents)}"
        self.agents[agent] = told["sweep"]
        return {"createAgent": {"agent": {"id": agent}}}

    def Heartbeat(self, told):
        sweep, commands = self.sweeps[self.agents[told["id"]]], []
        if not json.loads(told["runState"] or "{}"):
            commands = [{"type": "exit"}]
            if sweep["left"]:
                sweep["sent"] += 1
                values = {key: {"value": value} for key, value in sweep["left"].pop(0).items()}
                commands = [{"type": "run", "run_id": f"run{sweep['sent']}", "args": values,
                             "program": sweep["config"]["program"]}]  # fmt: skip
        return {"agentHeartbeat": {"agent": {"id": told["id"]}, "commands": json.dumps(commands)}}

    def RunResumeStatus(self, _):
        return {
            "model": {"id": "p", "name": "p", "internalId": "1", "entity": {"id": "e", "name": "me"}, "bucket": None}
        }

    def UpsertBucket(self, told):
        run = self.runs.setdefault(told["name"], {"history": {}, "config": {}})
        run |= {name: told[name] for name in ("sweep", "groupName") if told.get(name)}
        run["config"] |= json.loads(told.get("config") or "{}")
        bucket = {"id": "b", "name": told["name"], "displayName": told["name"], "config": told.get("config"),
                  "sweepName": told.get("sweep"), "historyLineCount": 0, "project": project(told)}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": True, "serverMessages": []}}

    def stream(self, name, content):
        run = self.runs.setdefault(name, {"history": {}, "config": {}})
        for line in content.get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
            run["history"] |= json.loads(line)
        if content.get("complete"):
            run["exit"] = content.get("exitcode")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.state._connections.add(self.request)

    def do_POST(self):
        self.state.asked += 1
        body = self._body()
        known = self.state.fault == "opens nothing" and b"Viewer" in body
        if self.state.fault in ("hangs", "opens nothing") and not known:
            self.state._over.wait()
        if self.state.fault is not None and not known:
            return self._reply(500, b"")
        with self.state.lock:
            answer = {}
            if self.path == "/graphql":
                asked = json.loads(body)
                named = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
                name = asked.get("operationName") or (named[1] if named else "")
                answer = self.state.answer(name, asked.get("variables") or {})
            elif file := re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                self.state.stream(file[1], json.loads(body))
        self._reply(200, json.dumps(answer).encode())

    do_PUT = do_POST

    def do_GET(self):
        self._reply(404, b"")

    def _body(self):
        body = b""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, code, body):
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def grid(parameters):
    """Every cell of a sweep, as the real server hands them out."""
    values = [part.get("values", [part.get("value")]) for part in parameters.values()]
    return (dict(zip(parameters, cell, strict=True)) for cell in itertools.product(*values))


def project(told):
    name = told.get("projectName") or told.get("project") or "p"
    return {
        "id": "p",
        "name": name,
        "entity": {"id": "e", "name": told.get("entityName") or told.get("entity") or "me"},
    }
