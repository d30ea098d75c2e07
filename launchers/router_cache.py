"""Trained gates, kept by content: what they learned from, how, and by which code. No two cells train the same gates."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merging.cache import key_of
from merging.checkpoints import digest
from merging.context import Context, Opened
from merging.experts import Experts
from merging.fit.gates import Learned, Router
from merging.merged import Merged

Make = Callable[[], dict[str, Tensor]]


class Fitted(NamedTuple):
    """A merge with its gates, the tasks that the collapse guard suspects, the splits and the time of the training."""

    merged: Merged
    collapsed: list[str]
    splits: tuple[str, ...]
    seconds: float


def fitted(
    router: Router, merged: Merged, experts: Experts, context: Context, keep: Callable[[Make], dict[str, Tensor]]
) -> Fitted:
    """Train the gates of a merge, unless `keep` has them."""

    def fit() -> dict[str, Tensor]:
        begin, opened = time.perf_counter(), Opened()
        trained, collapsed = router.fit(
            merged, experts, replace(context.acting(f"router={router.name}"), opened=opened)
        )
        gates = trained.routing.gates if trained.routing is not None else None  # an oracle has none
        suspected = torch.tensor([task in collapsed for task in merged.tasks])
        spent = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
        opened_splits = torch.tensor(list(" ".join(opened.by(f"router={router.name}")).encode()), dtype=torch.uint8)
        facts = {"collapsed": suspected, "splits": opened_splits, "seconds": spent}
        return {**({} if gates is None else gates.state_dict()), **facts}

    stored = keep(fit)
    suspected, splits = (stored.pop(name).tolist() for name in ("collapsed", "splits"))
    spent = float(stored.pop("seconds"))
    names = [task for task, collapsed in zip(merged.tasks, suspected, strict=True) if collapsed]
    return Fitted(router.restored(merged, stored), names, tuple(bytes(splits).decode().split()), spent)


def content(
    router: Learned, merged: Merged, context: Context, cell: Mapping[str, Any], made_by: str, seen: Iterable[str] = ()
) -> str:
    """The cache key of gates: equal keys are equal gates. `cell` is the identity of the cell.

    `seen` are the splits that the merge was made from.

    Where no task-specific part is before a gate in training, the shared weights alone count, whatever made them.
    """
    data = replace(context.acting(f"router={router.name}"), opened=Opened())  # naming opens nothing
    calibration = data.unlabelled(router.split)
    made = {name: cell[name] for name in ("method", "checkpoints", "experts")} | {"scale": merged.scale}
    made |= {"images": [data.unlabelled(split).ids for split in seen]}
    made |= {"dtypes": sorted({str(spec.dtype) for spec in merged.specs.values()})}
    init = merged.routing.init if merged.routing is not None else None
    learned_from = made if router.sees_deltas else [_shared(merged), sorted(merged.deltas), init]
    how = {name: cell[name] for name in ("router", "backbone", "suite", "seed", "engine")}
    images = (calibration.ids, calibration.head_ids, calibration.backbone, calibration.device.type)
    return key_of("fitted gates", made_by, learned_from, how, merged.parts, *images)


def _shared(merged: Merged) -> str:
    """SHA-256 of the weights that all inputs share."""
    hashed = hashlib.sha256()
    for key in sorted(merged.specs):
        hashed.update(f"{key} {digest(merged.static(key))} ".encode())
    return hashed.hexdigest()
