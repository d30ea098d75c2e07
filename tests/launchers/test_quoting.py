"""An override that Hydra cannot read is answered with the command that a shell passes on as it was meant."""

import re
import shutil
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from launchers.cli_help import spelled

PATHS = ["/d/a=b", "/d/{task}.pt", "{task}.pt", "/d/it's", "~/d", "/d/über", '/d/a"b', "/d/(x)[y]", "a;b&c", "/d/x=y\\",
         "/d/${output}/a=b"]  # fmt: skip
SHELLS = [shell for shell in ("sh", "bash", "dash", "zsh") if shutil.which(shell)]


def passed_on(shell, command):
    """The arguments that a command gets from a shell."""
    shown = f"{sys.executable} -c 'import sys; print(*sys.argv[1:], sep=chr(10))' {command.partition(' ')[2]}"
    return subprocess.run([shell, "-c", shown], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_works_in_a_shell(shell):
    advice = spelled([f"a{number}={path}" for number, path in enumerate(PATHS)])
    assert advice is not None
    arguments = passed_on(shell, advice.partition("Write: ")[2])
    assert [override.value() for override in OverridesParser.create().parse_overrides(arguments)] == PATHS


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["seed=1", "save=my", "models/x"], "duet seed=1 'save=my models/x'"),
        (["-m", "method=ties,", "tsv_m"], "duet -m 'method=ties, tsv_m'"),
        (["--cfg", "job", "save=/a=b"], "duet --cfg job 'save=\"/a=b\"'"),
    ],
)
def test_the_nearest_command_is_shown(arguments, command):
    advice = spelled(arguments)
    assert advice is not None and advice.endswith(f"Write: {command}")


def test_dashes():
    assert spelled(["--method=ties", "seed=1"]) == "Options have no dashes in front: duet method=ties seed=1"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["seed=1", "method@method.then=ties"],
        ["save=a,b"],
        ["--cfg", "job"],
        ["seed=[1"],
        ["a=b c"],
        ["~x"],
        ["a={b: c=d}"],
    ],
)
def test_what_is_readable_or_beyond_repair_needs_no_advice(arguments):
    assert spelled(arguments) is None


@pytest.mark.parametrize("path", ["/d/a=b", "/d/{task}"])
def test_the_command_line_ends_with_the_advice(duet_here, tmp_path, path):
    code, page, errors = duet_here(tmp_path / "outputs", f"save={path}")
    assert code == 1 and page == "" and "Traceback" not in errors
    assert re.search(rf"duet .*'save=\"{re.escape(path)}\"'", errors), errors


def test_a_comma_is_explained_by_hydra(duet_here, tmp_path):
    code, page, errors = duet_here(tmp_path / "outputs", "save=/d/a,b")
    assert code == 1 and page == "" and "Traceback" not in errors
    assert re.search(r"Ambiguous value for argument 'save=/d/a,b'.*--multirun", errors, re.DOTALL), errors
