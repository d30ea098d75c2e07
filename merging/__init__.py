"""Model merging on tensors: experts in, one multi-task model out. Works without Hydra, data sets or a GPU."""

from merging.api import load, merge, open_merged
from merging.cache import Cache
from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged

__all__ = ["Cache", "Experts", "Merged", "UserError", "load", "merge", "open_merged"]
