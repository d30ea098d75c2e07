"""Heads in checkpoints: parameters that belong to one task, which are left out of a merge."""

from collections.abc import Sequence

from merging.backbones.base import table_for
from merging.checkpoints.base import Checkpoint
from merging.checkpoints.views import Made, View
from merging.errors import UserError


def split_heads(checkpoints: Sequence[Checkpoint], table: str | None) -> tuple[list[Checkpoint], list[Checkpoint]]:
    """The checkpoints without their heads, and their heads alone.

    By the table of that name, else by the one that has all names of a checkpoint. Where there is none nothing is known
    to be a head, and where there would be nothing else no name tells that it is.
    """
    bodies, heads = zip(*(_split(checkpoint, table) for checkpoint in checkpoints), strict=True)
    return list(bodies), list(heads)


def _split(checkpoint: Checkpoint, table: str | None) -> tuple[Checkpoint, Checkpoint]:
    keys = {key: spec.merged for key, spec in checkpoint.specs().items()}
    try:
        known = table_for(table, [key for key, merged in keys.items() if merged])
    except UserError:
        if table is not None:
            raise
        return checkpoint, View(checkpoint, {})
    inside = frozenset(known.head_keys(keys))
    if not inside or len(inside) == len(keys):
        return checkpoint, View(checkpoint, {})
    body = View(checkpoint, {key: Made((key,)) for key in keys if key not in inside})
    return body, View(checkpoint, {key: Made((key,)) for key in inside})
