"""Downloads from a loopback hub by the real client: whole files or a clear error, whatever goes wrong on the way."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from hub import Fault, Hub

from merging import Cache
from merging.errors import UserError
from tasks import hub as client
from tasks.hub import HubFile, Missing, check_room, plan

REPO, FILE = "owner/model", "model.safetensors"
CONTENT = os.urandom(300_000)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub with one repository, and this process's client pointed at it. No waiting between attempts."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    with Hub(tmp_path / "served") as hub:
        hub.add(REPO, {FILE: CONTENT, "config.json": b"{}"})
        hub.here(monkeypatch, tmp_path / "hf")
        yield hub


def fetch(repo, filename, revision=None, cache=None):
    """One file under one name."""
    return client.fetch(HubFile(repo, (filename,), revision), cache)


def left(folder):
    """Contents of the hub's cache: what a later run could take for a whole file."""
    return [path for part in ("blobs", "snapshots") for path in folder.glob(f"*/{part}/**/*") if not path.is_dir()]


def test_a_file_is_fetched_once(served, tmp_path):
    path = fetch(REPO, FILE)
    assert path.read_bytes() == CONTENT and path.is_relative_to(tmp_path / "hf")
    assert fetch(REPO, "config.json").read_bytes() == b"{}"
    gets = len(served.asked("GET", REPO))

    assert fetch(REPO, FILE) == path
    assert len(served.asked("GET", REPO)) == gets == 2


def test_a_revision_is_kept_apart(served):
    commit = fetch(REPO, "config.json").parent.name
    assert fetch(REPO, FILE, revision=commit).parent.name == commit
    with pytest.raises(UserError, match="no revision v9"):
        fetch(REPO, FILE, revision="v9")


def test_what_is_not_there_is_named(served):
    with pytest.raises(Missing, match=r"owner/model \(main\) has no file weights.bin"):
        fetch(REPO, "weights.bin")
    with pytest.raises(UserError, match="no model owner/nothing"):
        fetch("owner/nothing", FILE)
    assert client.fetch(HubFile(REPO, ("weights.bin", FILE))).name == FILE
    with pytest.raises(Missing, match=r"other\.bin"):
        client.fetch(HubFile(REPO, ("weights.bin", "other.bin")))


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, "GatedRepo"), (403, None)])
def test_gated_files_tell_how_to_get_in(served, status, code):
    served.fault(FILE, Fault(status=status, code=code))
    with pytest.raises(UserError, match=r"owner/model/model.safetensors is not open to you.*HF_TOKEN"):
        fetch(REPO, FILE)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_hub_out_of_order_is_asked_again(served, method):
    served.fault(FILE, Fault(status=503, times=2, methods=(method,)))
    assert fetch(REPO, FILE).read_bytes() == CONTENT


def test_a_hub_that_stays_out_of_order_is_named(served, tmp_path):
    served.fault(FILE, Fault(status=503, methods=("GET",)))
    with pytest.raises(UserError, match=f"could not be downloaded from {served.url} in 3 attempts.*503"):
        fetch(REPO, FILE)
    assert not left(tmp_path / "hf")


def test_a_line_that_breaks_once_is_taken_up_again(served):
    served.fault(FILE, Fault(keep=0.4, times=1, methods=("GET",)))
    assert fetch(REPO, FILE).read_bytes() == CONTENT


def test_a_line_that_always_breaks_leaves_no_part_of_a_file(served, tmp_path):
    served.fault(FILE, Fault(keep=0.0, methods=("GET",)))
    with pytest.raises(UserError, match=r"could not be downloaded.*Nothing of it was kept"):
        fetch(REPO, FILE)
    assert not left(tmp_path / "hf")

    served.fault(FILE)
    assert fetch(REPO, FILE).read_bytes() == CONTENT


def test_another_content_than_announced_is_not_used(served, tmp_path):
    served.fault(FILE, Fault(sha="0" * 64))
    with pytest.raises(UserError, match="another sha256"):
        fetch(REPO, FILE)
    assert not left(tmp_path / "hf")
    assert len(served.asked("GET", "/cdn/")) == client.ATTEMPTS


def test_a_wrong_answer_once_is_fetched_again(served):
    (served.root / "models" / REPO / FILE).write_bytes(CONTENT)
    served.fault(FILE, Fault(sha="1" * 64, times=2))  # the size is asked for first
    assert hashlib.sha256(fetch(REPO, FILE).read_bytes()).digest() == hashlib.sha256(CONTENT).digest()


def test_a_file_damaged_in_the_cache_is_replaced_when_the_content_is_remembered(served, tmp_path):
    cache = Cache(tmp_path / "cache")
    path = fetch(REPO, FILE)
    path.resolve().write_bytes(CONTENT[:-1] + b"?")
    assert fetch(REPO, FILE, cache=cache).read_bytes() == CONTENT


def test_a_slow_line_is_waited_for(served):
    served.fault(FILE, Fault(delay=0.01, methods=("GET",)))  # sleep is shortened, also the server's
    assert fetch(REPO, FILE).read_bytes() == CONTENT


def test_offline_takes_what_is_there_and_says_what_is_not(served, tmp_path, monkeypatch):
    path = fetch(REPO, FILE)
    served.here(monkeypatch, tmp_path / "hf", offline=True)
    before = len(served.requests)

    assert fetch(REPO, FILE) == path
    assert plan([HubFile(REPO, (FILE,))])[0].cached
    for ask in (lambda: fetch(REPO, "config.json"), lambda: plan([HubFile(REPO, ("config.json",))])):
        with pytest.raises(
            UserError, match=r"owner/model/config.json is not in the cache .*HF_HUB_OFFLINE.*hf download"
        ):
            ask()
    assert client.fetch(HubFile(REPO, ("weights.bin", FILE))) == path  # the second of two names is the cached one
    assert len(served.requests) == before


def test_without_a_connection_the_cache_is_enough(served, monkeypatch):
    path = fetch(REPO, FILE)
    nobody = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", nobody)
    assert fetch(REPO, FILE) == path
    with pytest.raises(UserError, match=r"cannot be reached.*hf download owner/model config.json"):
        fetch(REPO, "config.json")


def test_the_plan_tells_sizes_without_a_download(served, tmp_path):
    fetch(REPO, "config.json")
    gets = len(served.asked("GET"))
    first, second = plan([HubFile(REPO, ("none.bin", FILE)), HubFile(REPO, ("config.json",))])

    assert (first.name, first.bytes, first.cached) == ("owner/model/model.safetensors", len(CONTENT), False)
    assert (second.name, second.bytes, second.cached) == ("owner/model/config.json", 2, True)
    assert second.where.read_bytes() == b"{}" and first.where == tmp_path / "hf"
    assert len(served.asked("GET")) == gets
    with pytest.raises(Missing, match=r"none\.bin"):
        plan([HubFile(REPO, ("none.bin",))])


def test_a_full_disk_is_told_before_the_download(served, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"has 0\.0 MB free, and 0\.3 MB are.*HF_HUB_CACHE"):
        fetch(REPO, FILE)
    assert not served.asked("GET")
    check_room([client.Download("small", 10, False, Path())])


def test_a_disk_that_fills_up_is_told(served, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(UserError, match="No space is left"):
        fetch(REPO, FILE)
    assert not left(tmp_path / "hf")


def test_a_process_with_the_usual_variables_gets_its_files(tmp_path):
    """The environment that a user sets, not patched constants; a slow line in real time."""
    code = (
        "import json, sys; from tasks.hub import HubFile, fetch, plan; "
        f"file = HubFile({REPO!r}, ({FILE!r},)); "
        "print(json.dumps([plan([file])[0].bytes, str(fetch(file))]))"
    )
    with Hub(tmp_path / "served") as hub:
        hub.add(REPO, {FILE: CONTENT})
        hub.fault(FILE, Fault(status=503, times=1), Fault(delay=0.1, methods=("GET",)))
        run = lambda **more: subprocess.run(  # noqa: E731
            [sys.executable, "-c", code], env=os.environ | hub.env(tmp_path / "hf") | more, cwd=ROOT,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        done = run()
        assert done.returncode == 0, done.stderr
        size, path = json.loads(done.stdout)
        assert size in (None, len(CONTENT)) and Path(path).read_bytes() == CONTENT
        asked = len(hub.requests)
        offline = run(HF_HUB_OFFLINE="1")
        assert json.loads(offline.stdout) == [len(CONTENT), path] and len(hub.requests) == asked
