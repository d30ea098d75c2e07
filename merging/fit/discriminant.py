"""Linear discriminant analysis: a linear gate in closed form, whose softmax says how sure it is."""

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from merging.errors import UserError

FOLDS = 4  # in which samples are held out while the certainty is measured
LEAST, MOST = -7.0, 3.0  # logarithm of the factor on logits


def discriminant(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Weight [C, F] and bias [C], of which the softmax of x W^T + b is the posterior of equally likely Gaussians.

    They have the means of x [n, F] by label and one covariance, the mean of those `within` the classes: nothing is to
    be chosen, and there may be fewer samples than features.
    """
    groups = [x[labels == label] for label in range(classes)]
    means = torch.stack([group.mean(0) for group in groups])
    covariance = torch.stack([within(group) for group in groups]).mean(0)
    weight = torch.linalg.lstsq(covariance, means.T).solution.T  # features that never vary have no inverse
    return weight, -(means * weight).sum(1) / 2


def within(x: Tensor) -> Tensor:
    """Covariance [F, F] of x [n, F], shrunk towards its diagonal by as much as Ledoit and Wolf (2004) estimate."""
    spread = x.std(0, correction=0)
    spread[spread == 0] = 1.0
    x = (x - x.mean(0)) / spread
    correlation = x.T @ x / len(x)
    target = correlation.trace() / len(spread) * torch.eye(len(spread), dtype=x.dtype)
    noise = (x.square().sum(1).square().mean() - correlation.square().sum()) / len(x)
    distance = (correlation - target).square().sum()
    share = (noise / distance).clamp(0, 1) if distance else 0.0
    return torch.lerp(correlation, target, torch.as_tensor(share, dtype=x.dtype)) * spread * spread[:, None]


def calibrated(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The `discriminant`, its logits times the factor that makes the labels of held-out samples most likely.

    Features are no Gaussians, and on samples that means and covariance were not taken from the posteriors are too
    sure. Raises UserError for a single class, and for one of a single sample, which could not be held out.
    """
    from scipy.optimize import minimize_scalar

    counts = labels.bincount(minlength=classes)
    if classes < 2 or counts.min() < 2:
        raise UserError(
            f"router=discriminant tells tasks apart by two samples or more of each, and there are {classes} tasks, of "
            f"which one has {counts.min()}. Give more (suite.sizes.calibration), or set router=task_id."
        )
    fold, logits = torch.empty_like(labels), x.new_empty(len(x), classes)
    for label, count in enumerate(counts):
        fold[labels == label] = torch.arange(int(count)) % FOLDS
    for held_out in (fold == index for index in range(FOLDS)):
        weight, bias = discriminant(x[~held_out], labels[~held_out], classes)
        logits[held_out] = x[held_out] @ weight.T + bias

    def surprise(power: float) -> float:
        return functional.cross_entropy(logits * numpy.exp(power), labels).item()

    factor = float(numpy.exp(minimize_scalar(surprise, bounds=(LEAST, MOST), method="bounded").x))  # type: ignore[union-attr]
    weight, bias = discriminant(x, labels, classes)
    return weight * factor, bias * factor
