"""The rules of the house that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("merging", "tasks", "launchers")
ABOVE = {"merging": {"tasks", "launchers"}, "tasks": {"launchers"}, "launchers": set()}
FRAMEWORKS = {"hydra", "omegaconf", "wandb", "submitit", "optuna"}
FILES = sorted(path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py"))


def tree(path):
    return ast.parse(path.read_text("utf-8"))


def imported(path):
    """Top-level names of all modules that a file imports, at its head or inside a function."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.relative_to(ROOT).parts[0] if node.level else str(node.module).partition(".")[0])
    return names


def violations(files, forbidden):
    found = {str(path.relative_to(ROOT)): sorted(imported(path) & forbidden) for path in files}
    return {path: names for path, names in found.items() if names}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    assert not violations((ROOT / package).rglob("*.py"), ABOVE[package] | {"tests"})


@pytest.mark.parametrize("package", ["merging", "tasks"])
def test_frameworks_stay_in_the_launchers(package):
    found = violations((ROOT / package).rglob("*.py"), FRAMEWORKS)
    assert found == ({"merging/fit/black_box.py": ["optuna"]} if package == "merging" else {})  # the one search


def test_merging_knows_no_data_sets():
    data_sets_and_pictures = {"sklearn", "torchvision", "datasets", "matplotlib", "rich"}
    assert not violations((ROOT / "merging").rglob("*.py"), data_sets_and_pictures)


def test_importing_merging_loads_neither_frameworks_nor_other_packages():
    """Also not through a library that imports them in turn."""
    unwanted = FRAMEWORKS | {"tasks", "launchers", "matplotlib", "open_clip"}
    code = f"import sys, merging, merging.methods; sys.exit(', '.join({unwanted!r} & {{*sys.modules}}) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_is_a_drawer_for_everything():
    names = {"utils.py", "helpers.py", "util.py", "helper.py", "misc.py", "common.py"}
    assert not [path for path in FILES if path.name in names]


def test_no_file_has_more_than_300_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert not {path: length for path, length in lengths.items() if length > 300}


def test_no_function_has_more_than_50_lines():
    functions = (
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert not {name: length for name, length in functions if length > 50}


def test_pickles_are_never_executed():
    """No torch.load, and of `pickle` only the machine whose calls checkpoints.inert replaces. Tests write some."""
    packages = [path for path in FILES if path.relative_to(ROOT).parts[0] in PACKAGES and path.name != "inert.py"]
    assert not violations(packages, {"pickle", "dill", "cloudpickle"})
    attributes = ((path, node) for path in packages for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute))
    assert not [f"{path}:{node.lineno}" for path, node in attributes if ast.unparse(node) == "torch.load"]
