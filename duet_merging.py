"""Where the console scripts start: a name that nobody else has, so that what stands in a package's place is named."""

import os
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

HOME = Path(__file__).resolve().parent
PACKAGES = ("launchers", "conf", "merging", "tasks")


def duet() -> None:
    """The command of that name."""
    _start("launchers.run")


def duet_finetune() -> None:
    """The command of that name."""
    _start("launchers.finetune")


def _start(program: str) -> None:
    if wrong := shadowed(PACKAGES):
        sys.exit(wrong)
    import_module(program).main()


def shadowed(names: Iterable[str], home: Path = HOME) -> str | None:
    """Which file is in the way of the packages `names` in `home`, and what to do; None if all are found there."""
    for name in names:
        found = find_spec(name)
        places = [found.origin, *(found.submodule_search_locations or ())] if found else []
        first = next((Path(place).resolve() for place in places if place is not None), None)
        if first is not None and not first.is_relative_to(home / name):
            file = first.parent if first.name == "__init__.py" else first
            return (
                f"{file} is in the way: Python finds it in place of the package {name} of duet-merging "
                f"({home / name}), because {file.parent} is earlier on its path. {_remedy(file.parent)}, or rename "
                f"{file.name}."
            )
    return None


def _remedy(folder: Path) -> str:
    """How the folder comes off the path of Python."""
    listed = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if folder in listed:
        return f"Take {folder} out of PYTHONPATH"
    if folder == Path.cwd() and sys.path[:1] in ([""], [str(folder)]):
        return "Run the command from another folder (`python -m` looks into the current one first)"
    return f"Take {folder} off sys.path, or uninstall what put it there"
