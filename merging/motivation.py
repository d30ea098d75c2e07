"""What DuetMerging builds on, measured: few active neurons, others for every task, and directions that tasks share."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.context import Context
from merging.decompose.tucker import spectrum
from merging.experts import Experts
from merging.neurons import Neurons, chance, jaccard, largest_mass

MODES = ("task", "out", "in")
POINTS = 32  # ranks of a curve at most


@dataclass(frozen=True)
class Block:
    """The hidden neurons of one FFN. Shares lie in 0..1."""

    hidden: int
    active: list[float]  # per task: of neurons that hold `mass` of the summed activity
    kept: float  # of neurons that a mask keeps, mean over tasks
    overlap: list[list[float]]  # Jaccard index of the masks of two tasks
    chance: float  # that of random masks which keep as much


@dataclass(frozen=True)
class Curve:
    """Share of the squared norm that the leading directions of one mode hold."""

    ranks: list[int]
    energy: list[float]


@dataclass(frozen=True)
class Matrix:
    """One FFN matrix of all tasks, [T, m, n]."""

    shape: list[int]
    modes: dict[str, Curve]  # task, out, in


def blocks(experts: Experts, context: Context, neurons: Neurons, mass: float) -> dict[str, Block]:
    """By block, in order: the share of neurons that hold `mass` of a task's activity, and how far masks overlap.

    Blocks go by their number, or where there are several stacks by their name. Raises UserError without unlabelled
    images, and where a mask is empty.
    """
    masks, measured = neurons.masks(experts, context), neurons.measured(experts, context)
    placed = sorted((name.rpartition(".")[0], int(name.rpartition(".")[2]), name) for name in measured)
    alone = len({stack for stack, _, _ in placed}) == 1
    return {str(i) if alone else name: _block(measured[name], masks[name], mass) for _, i, name in placed}


def _block(activity: Tensor, mask: Tensor, mass: float) -> Block:
    active, kept = largest_mass(activity.abs(), mass).double().mean(1), float(mask.double().mean())
    return Block(activity.shape[1], rounded(active), kept, [rounded(line) for line in jaccard(mask)], chance(kept))


def matrices(experts: Experts) -> Mapping[str, Matrix]:
    """By name: how the energy of every FFN matrix spreads over the directions of its three unfoldings."""
    shapes = {key: spec.shape for key, spec in experts.specs().items()}
    spectra: dict[str, Matrix] = {}
    for key, tau in experts.stream([key for key in experts.keys("ffn") if len(shapes[key]) == 2]):
        spectra[key] = Matrix([*tau.shape], {name: curve(tau, mode) for mode, name in enumerate(MODES)})
    return spectra


def curve(tau: Tensor, mode: int) -> Curve:
    """The share of energy of [T, m, n] that the best bases of one unfolding hold, by rank; 1 where there is none."""
    held = torch.from_numpy(spectrum(tau, mode).copy()).cumsum(0)
    shares = held / held[-1] if held[-1] > 0 else torch.ones_like(held)
    ranks = sorted({max(1, round(len(held) * point / POINTS)) for point in range(1, POINTS + 1)})
    return Curve(ranks, rounded(shares[torch.tensor(ranks) - 1]))


def rounded(values: Tensor) -> list[float]:
    """For a file."""
    return [round(value, 5) for value in values.tolist()]
