"""The collapse guard of what lowers an entropy."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merging.fit.objectives import mean_entropy


class CollapseGuard:
    """Tasks whose predictions fell onto few classes while their entropy went down.

    A task is suspected when the entropy of its mean prediction over the last quarter of the steps lies below half of
    log C, and its mean entropy is lower than over the first quarter.
    """

    def __init__(self, tasks: Sequence[str]):
        self.tasks = tasks
        self._steps: list[list[Tensor]] = [[] for _ in tasks]  # mean predictions [C], then their mean entropy

    def note(self, task: int, logits: Tensor) -> None:
        """One step's logits [B, C] of a task."""
        logits = logits.detach().float()
        self._steps[task].append(torch.cat([logits.softmax(-1).mean(0), mean_entropy(logits)[None]]))

    def collapsed(self) -> list[str]:
        """Names of the suspected tasks."""
        suspected = []
        for name, steps in zip(self.tasks, self._steps, strict=True):
            quarter = max(len(steps) // 4, 1)
            first, last = (torch.stack(part).mean(0) for part in (steps[:quarter], steps[-quarter:]))
            if last[-1] < first[-1] and torch.special.entr(last[:-1]).sum() < 0.5 * math.log(len(last) - 1):
                suspected.append(name)
        return suspected

    def state(self) -> dict[str, Tensor]:
        """What a descent that goes on later must know."""
        return {str(task): torch.stack(steps) for task, steps in enumerate(self._steps)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        self._steps = [list(state[str(task)]) for task in range(len(self.tasks))]
