"""What is measured: tasks, their heads, metrics and scores; suites of tasks; and what scores a merge on them."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.data import SuiteData
    from tasks.evaluate import Grid
    from tasks.suite import Suite
    from tasks.task import array_task

__all__ = ["Grid", "Suite", "SuiteData", "array_task"]
_HOMES = {"Grid": "evaluate", "Suite": "suite", "SuiteData": "data", "array_task": "task"}


def __getattr__(name: str) -> object:
    """The names above, from their modules when they are first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
