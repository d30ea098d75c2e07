"""One merge method per file: a frozen dataclass whose fields are the options and whose call maps Experts to Merged.

A file in this folder is all that a method needs: its class is found by name, and imported when it is asked for.
"""

import pkgutil
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

from merging.options import snake_case


def discovered() -> dict[str, type]:
    """All methods by the names of their classes, in the order of their files; imports every file."""
    modules = [import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__)]
    return {
        name: each for module in modules for name, each in vars(module).items() if _is_method(each, module.__name__)
    }


def _is_method(found: Any, module: str) -> bool:
    """Whether it is a frozen dataclass with `needs`, and defined in that module."""
    frozen = isinstance(found, type) and is_dataclass(found) and found.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return frozen and hasattr(found, "needs") and found.__module__ == module


def __getattr__(name: str) -> Any:
    """The class of that name: from the file named after it (IsoCts: iso_cts.py), else from any other."""
    if name == "__all__":
        return [*discovered(), "Method"]
    if name[:1].isupper():
        file = snake_case(name)
        if any(each.name == file for each in pkgutil.iter_modules(__path__)):
            module = import_module(f"{__name__}.{file}")
            if hasattr(module, name):
                return getattr(module, name)
        if name in (methods := discovered()):
            return methods[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
