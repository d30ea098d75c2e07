"""The wheel holds what the programs read beside their code: configurations, the page of the report, weights, facts."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("merging", "tasks", "launchers", "conf")


def shipped(name):
    return "__pycache__" not in name and not name.startswith("conf/local/")


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    pytest.importorskip("hatchling", reason="no wheel is built: pip install hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        return file.namelist()


def test_every_file_of_the_packages_is_in_the_wheel(names):
    beside = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*")
              if path.is_file()}  # fmt: skip
    assert {name for name in beside if shipped(name)} <= set(names)
    assert {name.rpartition("/")[2] for name in names if name.startswith("launchers/results/page/")} == {
        "figures.mplstyle", "notes.txt", "report.css", "report.html", "report.js", "show.txt", "table.md", "table.tex",
        "warnings.txt",
    }  # fmt: skip
    for some in ("conf/config.yaml", "conf/hydra/launcher/", "conf/hydra/sweeper/", "conf/experiment/", "tasks/mini/"):
        assert any(name.startswith(some) for name in names), some


def test_nothing_else_is(names):
    strange = [
        name for name in names if not name.startswith((*(f"{package}/" for package in PACKAGES), "duet_merging-"))
    ]
    assert strange == ["duet_merging.py"] and all(map(shipped, names))
