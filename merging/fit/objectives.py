"""What learning minimises, one small object each: a weight, a name, and a loss of one task's batch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from merging.options import Share


@dataclass(frozen=True)
class Batch:
    """Some samples of one task as the model in training sees them, and what is known about them; all made on demand."""

    features: Tensor  # [n, D]
    head: Callable[[Tensor], Tensor]
    labels: Callable[[], Tensor]  # [n]
    expert: Callable[[], Tensor]  # features [n, D] of the task's own expert

    @cached_property
    def logits(self) -> Tensor:
        """[n, C], through the task's frozen head."""
        return self.head(self.features)

    @cached_property
    def expert_logits(self) -> Tensor:
        """[n, C] of the task's own expert."""
        return self.head(self.expert())


@dataclass(frozen=True)
class Objective:
    """A loss of one task's batch and its weight. needs: "labels" where it compares with them."""

    weight: float = 1.0
    name: ClassVar[str]
    needs: ClassVar[str] = "inputs"

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of one batch, a scalar."""
        raise NotImplementedError


@dataclass(frozen=True)
class Entropy(Objective):
    """Mean Shannon entropy (nats) of the predictions: AdaMerging, WEMoE, DuetMerging."""

    name: ClassVar[str] = "entropy"

    def __call__(self, batch: Batch) -> Tensor:
        return mean_entropy(batch.logits)


@dataclass(frozen=True)
class MarginalEntropy(Objective):
    """Minus the entropy of the mean prediction: against the collapse onto few classes."""

    name: ClassVar[str] = "marginal"

    def __call__(self, batch: Batch) -> Tensor:
        return -marginal_entropy(batch.logits)


@dataclass(frozen=True)
class FeatureDistillation(Objective):
    """1 - cosine of the features to those of the task's own expert, mean over the samples."""

    name: ClassVar[str] = "distillation"

    def __call__(self, batch: Batch) -> Tensor:
        ours, theirs = (functional.normalize(features, dim=-1) for features in (batch.features, batch.expert()))
        return 1 - (ours * theirs).sum(-1).mean()


@dataclass(frozen=True)
class FeatureL1(Objective):
    """Mean absolute difference of the features from those of the task's own expert: Representation Surgery."""

    name: ClassVar[str] = "l1"

    def __call__(self, batch: Batch) -> Tensor:
        return (batch.features - batch.expert()).abs().mean()


@dataclass(frozen=True)
class FeatureError(Objective):
    """Mean squared difference of the features from those of the task's own expert."""

    name: ClassVar[str] = "feature_error"

    def __call__(self, batch: Batch) -> Tensor:
        return functional.mse_loss(batch.features, batch.expert())


@dataclass(frozen=True)
class LogitDistillation(Objective):
    """KL divergence of the expert's predictions from ours at a temperature, times its square (Hinton et al., 2015).

    Of a head that gives a number the squared difference.
    """

    temperature: float = 1.0
    name: ClassVar[str] = "logit_distillation"

    def __call__(self, batch: Batch) -> Tensor:
        if batch.logits.shape[-1] == 1:
            return functional.mse_loss(batch.logits.float(), batch.expert_logits.float())
        ours, theirs = (
            (logits.float() / self.temperature).log_softmax(-1) for logits in (batch.logits, batch.expert_logits)
        )
        return self.temperature**2 * functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Cross-entropy with the labels, of labels that are numbers the mean squared error."""

    name: ClassVar[str] = "cross_entropy"
    needs: ClassVar[str] = "labels"

    def __call__(self, batch: Batch) -> Tensor:
        logits, labels = batch.logits.float(), batch.labels()
        if labels.is_floating_point():
            return functional.mse_loss(logits.reshape(len(labels)), labels.float())
        return functional.cross_entropy(logits, labels)


@dataclass(frozen=True)
class PseudoLabels(Objective):
    """Cross-entropy with trusted labels and with our own classes where they are likelier than a threshold (FixMatch).

    The labels of a batch are the trusted ones, -1 where there is none. threshold: of probabilities.
    """

    threshold: Share = 0.99
    name: ClassVar[str] = "pseudo_labels"

    def __call__(self, batch: Batch) -> Tensor:
        logits, labels = batch.logits.float(), batch.labels()
        likelihood, classes = logits.detach().softmax(-1).max(-1)
        kept = (labels >= 0) | (likelihood > self.threshold)
        losses = functional.cross_entropy(logits, torch.where(labels >= 0, labels, classes), reduction="none")
        return (losses * kept).sum() / kept.sum().clamp_min(1)


def mean_entropy(logits: Tensor) -> Tensor:
    """Mean Shannon entropy (nats) of softmax over [B, C], from log_softmax in fp32."""
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy (nats) of the mean prediction over [B, C]: log C when all classes are used alike, 0 after collapse."""
    logs = logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))
    return -(logs.exp() * logs).sum(-1)
