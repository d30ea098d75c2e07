"""One merge method per file: a frozen dataclass whose fields are the options and whose call maps Experts to Merged.

A file in this folder is all that a method needs: its class is found by name, and imported when it is asked for.
"""

import pkgutil
from dataclasses import is_dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from merging.options import snake_case


def discovered() -> dict[str, type]:
    """All methods by the names of their classes, in the order of their files; imports every file."""
    modules = [import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
    return {name: kind for module in modules for name, kind in vars(module).items() if _is_method(kind, module)}


def _is_method(kind: Any, module: ModuleType) -> bool:
    """Whether it is a frozen dataclass with `needs`, and defined in that module."""
    frozen = isinstance(kind, type) and is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return frozen and hasattr(kind, "needs") and kind.__module__ == module.__name__


def __getattr__(name: str) -> Any:
    """The class of that name: from the file named after it (IsoCts: iso_cts.py), else from any other."""
    if name == "__all__":
        return [*discovered(), "Method"]
    if name[:1].isupper():
        files = {file.name for file in pkgutil.iter_modules(__path__)}
        if snake_case(name) in files and hasattr(module := import_module(f"{__name__}.{snake_case(name)}"), name):
            return getattr(module, name)
        if name in (methods := discovered()):
            return methods[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
