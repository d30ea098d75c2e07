"""A foreign module with the name of one of our packages is named, with what to do."""

import os
import subprocess
import sys

import pytest

from duet_merging import HOME, PACKAGES, shadowed


def run(code, cwd, **settings):
    """What a fresh interpreter writes and its status; our packages are on its path, behind its current folder."""
    path = os.pathsep.join([*filter(None, [settings.pop("before", None)]), str(HOME)])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *code], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["conf", "merging", "tasks"])
@pytest.mark.parametrize("kind", ["file", "package"])
def test_a_foreign_module_in_the_current_folder(tmp_path, name, kind):
    own = tmp_path / name / "__init__.py" if kind == "package" else tmp_path / f"{name}.py"
    own.parent.mkdir(exist_ok=True)
    own.write_text("x = 1\n")
    done = run(["-m", "launchers.table", "--help"], tmp_path)
    named = own.parent if kind == "package" else own
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"{named} is in the way: Python finds it in place of the package {name} ")
    assert f"from another folder (`python -m` looks into the current one first), or rename {named.name}." in done.stderr


@pytest.mark.parametrize("command", ["duet", "duet_finetune"])
@pytest.mark.parametrize("name", PACKAGES)
def test_a_foreign_module_on_the_path_of_python(tmp_path, name, command):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / f"{name}.py").write_text("")
    console_script = ["-c", f"import duet_merging; duet_merging.{command}()"]
    done = run(console_script, tmp_path, before=str(tmp_path / "elsewhere"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"Take {tmp_path / 'elsewhere'} out of PYTHONPATH, or rename {name}.py." in done.stderr


def test_a_folder_without_python_files_is_not_in_the_way(tmp_path):
    for name in ("conf", "tasks"):
        (tmp_path / name).mkdir()
    done = run(["-m", "launchers.table", "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert shadowed(PACKAGES) is None
