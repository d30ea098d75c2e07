"""Which samples of a data set serve which split."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from merging.errors import UserError

VAL_SHARE = 0.1  # of the training samples, at most


class Chosen(NamedTuple):
    """Samples of one part of a data set, in the order in which the split has them."""

    part: str  # train | val | test, as the source has them
    indices: Tensor  # int64 [N]


@dataclass(frozen=True)
class Rule:
    """How splits are drawn.

    val: at most that many samples and a tenth of train, the last ones of torch's permutation of `seed`: the validation
    split of task_vectors and its descendants. calibration: at most that many of the samples left to train, in drawn
    order, so that the first few are of all classes. limit: at most that many samples per split, drawn by `seed`.
    test_share: the share that is held out for test where a data set has no test part.
    """

    val: int = 5000
    calibration: int = 1024
    limit: int | None = None
    test_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("val", "calibration", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"suite.{name}={value} leaves a split empty. Give at least 1 image.")
        if not 0 < self.test_share < 1:
            raise UserError(f"test_share={self.test_share} is out of range: it must lie between 0 and 1.")

    def facts(self, split: str) -> list[int | float | None]:
        """What decides the samples of a split beside the data set."""
        options = {"test": [], "calibration": [self.val, self.calibration]}.get(split, [self.val])
        return [self.limit, self.seed, self.test_share, *options]

    def choose(self, split: str, sizes: Callable[[str], int | None], task: str) -> Chosen:
        """The samples of `split`; `sizes` tells how many a part has, None for one that is not there.

        Raises UserError where none are left.
        """
        pool = self._order(sizes("train") or 0)  # what is left to train
        for part in ("test", "val"):  # held out of train where there is no such part
            count = sizes(part)
            if count is None:
                most = self.test_share * len(pool) if part == "test" else min(VAL_SHARE * len(pool), self.val)
                pool, held = pool[: -max(1, int(most))], pool[-max(1, int(most)) :]
                chosen = Chosen("train", held.sort().values)
            else:
                chosen = Chosen(part, torch.arange(count) if part == "test" else self._order(count)[: self.val])
            if split == part:
                return self._limited(chosen.part, chosen.indices.sort().values, task)
        if split == "calibration":
            return self._limited("train", pool[: self.calibration], task, drawn=True)
        return self._limited("train", pool.sort().values, task)

    def _order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))

    def _limited(self, part: str, indices: Tensor, task: str, drawn: bool = False) -> Chosen:
        if len(indices) == 0:
            raise UserError(
                f"{task} has too few images for the splits train, val and test. Give it more, or a smaller share."
            )
        if self.limit is not None and len(indices) > self.limit:
            some = self._order(len(indices))[: self.limit]
            indices = indices[: self.limit] if drawn else indices[some.sort().values]
        return Chosen(part, indices)
