"""One task as several, which differ in how many of its training samples they have: for bagging."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from merging.errors import UserError
from merging.ops import generator
from merging.preflight import check_range
from tasks.heads.text import TextHead
from tasks.split import Split
from tasks.suite import Suite, known

CUT = "train"  # the split of which a share is taken; the others are whole


@dataclass(frozen=True)
class Share:
    """The samples of a task, and of those to train a random `percent`, each at most once, in their old order."""

    whole: Any  # tasks.task.Data
    percent: int
    seed: int

    def split(self, name: str) -> Split:
        whole = self.whole.split(name)
        if name != CUT:
            return whole
        count, rng = len(whole), generator("share", self.seed, self.percent)
        rows = torch.randperm(count, generator=rng)[: max(1, round(count * self.percent / 100))].sort().values
        return Split(name, *whole.take(rows))

    def content(self, split: str) -> str:
        """Id of a split."""
        known = split != CUT and hasattr(self.whole, "content")
        return self.whole.content(split) if known else self.split(split).id

    def __getattr__(self, name: str) -> Any:
        """All else that is asked of samples, their classes among it, is that of the whole."""
        if name == "whole":  # while an instance is unpickled
            raise AttributeError(name)
        return getattr(self.whole, name)


@dataclass(frozen=True)
class HeadOf:
    """The head of a task, for those that are shares of it under names of their own."""

    source: Any  # tasks.heads.head.HeadSource
    task: str

    def open(self, task: str, classes: Sequence[str]) -> nn.Module:
        return self.source.open(self.task, classes)

    def content(self, task: str, classes: Sequence[str]) -> str:
        """Id of a head that need not be opened, where the source has one."""
        return self.source.content(self.task, classes)


def build(name: str, whole: Suite, task: str, shares: Sequence[int], seed: int = 0) -> Suite:
    """A suite of tasks `<task>_<percent>`: the same classes, head, validation and test samples, shares of train.

    Raises UserError for a task that the suite `whole` does not have, and for shares out of 1 to 100 or listed twice.
    """
    tasks = {one.name: one for one in whole.every}
    chosen: Any = tasks[known(task, tuple(tasks), whole.name)]
    for percent in shares:
        check_range("suite: shares", percent, 1, 100)
    source = getattr(chosen, "heads", None)
    unnamed = source is None or isinstance(source, TextHead)  # which is made of the names of classes alone
    heads = {} if unnamed else {"heads": HeadOf(source, task)}
    data = {f"{task}_{percent}": Share(chosen.data, percent, seed) for percent in shares}
    if len(data) < len(shares):
        raise UserError(f"suite: shares={list(shares)} lists one twice.")
    return Suite(name, tuple(replace(chosen, name=share, data=cut, **heads) for share, cut in data.items()))
