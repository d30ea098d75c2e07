from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from merging.combined import terms
from merging.entries import Entry, entrywise, sweep
from merging.experts import Experts
from merging.merged import Merged
from merging.methods.ties import alike
from merging.ops import Sweep, magnitude_at
from merging.options import Fraction, Options, Within


@dataclass(frozen=True)
class Pcb(Options):
    """PCB-Merging: every entry of every task vector weighed by its rank among its own and by agreement with the others.

    Du et al., 2024, arXiv 2410.02396. A task's magnitudes are clipped to quantiles [clip, 1 - clip] of the whole model
    and mapped to a in [0, 1]. Its score is exp(T a^2) tanh(tau_t * sum): of the sum over tasks of sign(tau) a
    ("normalised", the authors' code for vision) or of tau ("raw", their other file; a third file's is left out).
    The top `density` of a task's scores are its weights, 0 for the last and 1 for the largest; the change is the
    weighted mean of the clipped task vectors. scale: 1.2 for all tasks; the search for one per task is left out. clip:
    0.01 for vision, 0.0001 in the other file, where density is 0.1. Ours alone: scores below zero never have a weight,
    and a task whose magnitudes are all equal has none (there not a number). Takes five passes over the experts.
    """

    density: Fraction = 0.05
    clip: Annotated[float, Within(0.0, 0.4)] = 0.01
    agreement: Literal["normalised", "raw"] = "normalised"
    scale: float = 1.2
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        size = sum(spec.shape.numel() for spec in experts.specs().values())
        if size == 0:
            return experts.merged({}, self.scale)
        changes, tasks = partial(sweep, experts), len(experts.tasks)
        largest = size - max(0, int(size * (1 - self.clip) - 1))
        clipped = Bounds.at(changes, tasks, size - int(size * self.clip), largest)
        scores = self._positive_scores(experts, clipped)
        kept = Bounds.at(scores, tasks, max(1, size - int(size * (1 - self.density))), 1)

        def merge(_: Entry, tau: Tensor) -> Tensor:
            weights = kept.position(self._scores(tau, clipped))
            magnitudes = tau.abs().clamp_(clipped.low, clipped.high)
            return (weights * magnitudes * tau.sign()).sum(0) / weights.sum(0).clamp_min(1e-12)

        return experts.merged(alike(experts, terms(entrywise(experts, merge))), self.scale)

    def _positive_scores(self, experts: Experts, clipped: "Bounds") -> Sweep:
        """A sweep over the scores of all entries; those below zero, which no task keeps, are zero."""
        return lambda work: sweep(experts, lambda name, tau: work(name, self._scores(tau, clipped).clamp_min_(0)))

    def _scores(self, tau: Tensor, clipped: "Bounds") -> Tensor:
        """Scores [T, n] of tau [T, n]."""
        a = clipped.position(tau.abs())
        together = (tau.sign() * a).sum(0) if self.agreement == "normalised" else tau.sum(0)
        agreement = torch.from_numpy(np.tanh((tau * together).numpy()))  # several times as fast as torch's
        return a.square_().mul_(len(tau)).exp_().mul_(agreement)


class Bounds(NamedTuple):
    """The smallest and the largest magnitude that count, of every task [T, 1]."""

    low: Tensor
    high: Tensor

    @classmethod
    def at(cls, pieces: Sweep, tasks: int, *ranks: int) -> "Bounds":
        """Those of two ranks, from the largest."""
        low, high = magnitude_at(pieces, torch.tensor(ranks).expand(tasks, 2)).unbind(1)
        return cls(low[:, None], high[:, None])

    def position(self, values: Tensor) -> Tensor:
        """Of values [T, n] between the two: 0 up to the smallest, 1 from the largest on; 0 where they are equal."""
        width = self.high - self.low
        return ((values - self.low) / torch.where(width > 0, width, torch.inf)).clamp_(0, 1)
