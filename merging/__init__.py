"""Model merging on tensors: experts in, one multi-task model out. Works without Hydra, data sets or a GPU."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from merging.api import load, merge, open_merged
    from merging.cache import Cache
    from merging.context import Context
    from merging.errors import UserError
    from merging.experts import Experts
    from merging.fit.gates import Learned
    from merging.merged import Merged

__all__ = ["Cache", "Context", "Experts", "Learned", "Merged", "UserError", "load", "merge", "open_merged"]
_HOMES = {"load": "api", "merge": "api", "open_merged": "api", "Cache": "cache", "Context": "context",
          "UserError": "errors", "Experts": "experts", "Learned": "fit.gates", "Merged": "merged"}  # fmt: skip


def __getattr__(name: str) -> object:
    """The names above, from their modules when they are first asked for: what imports torch is not loaded before."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
