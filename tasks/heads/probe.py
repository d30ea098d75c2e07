"""Linear probes: heads fitted on the features of an expert's own training samples."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from merging.cache import Cache, code, key_of
from merging.checkpoints import Checkpoint
from merging.errors import UserError
from merging.preflight import some
from tasks.engine import Engine
from tasks.suite import Suite
from tasks.task import LabelledTask

STRENGTH = 1.0  # inverse of the L2 penalty, and the penalty of the ridge, on standardised features
STEPS = 1000  # of L-BFGS at most


@dataclass(frozen=True)
class Probe:
    """A linear head on frozen features: logistic regression by L-BFGS, for numbers ridge regression in closed form.

    checkpoint: the task's expert, whose features of the train split it is fitted on. data: the task's samples. The
    result repeats; it is kept in the cache, if any, by the content of all that it depends on.
    """

    checkpoint: Checkpoint
    backbone: Any
    data: Any
    cache: Cache | None
    engine: Engine = field(default_factory=lambda: Engine("cpu"))

    def open(self, task: str, classes: Sequence[str]) -> nn.Linear:
        """Raises UserError for a class without a training sample."""
        fit = partial(self._fit, task, classes)
        stored = fit() if self.cache is None else self.cache.tensors(self._key(classes), fit)
        layer = nn.Linear(stored["weight"].shape[1], stored["weight"].shape[0])
        layer.load_state_dict(stored)
        return layer.requires_grad_(False).eval()

    def content(self, task: str, classes: Sequence[str]) -> str:
        return self._key(classes)

    def _key(self, classes: Sequence[str]) -> str:
        train = self.data.split("train").id
        facts = self.checkpoint.id, self.backbone.identity(), train, len(classes), self.engine.precision
        return key_of("linear probe", code((__name__,), ("scikit-learn",)), *facts)

    def _fit(self, task: str, classes: Sequence[str]) -> dict[str, Tensor]:
        labels = self.data.split("train").labels
        if missing := [name for index, name in enumerate(classes) if not bool((labels == index).any())]:
            raise UserError(f"{task} has no training sample of {some(missing)}, so no probe can be fitted. Add some.")
        weight, bias = fit_linear(self._features(), labels)
        return {"weight": weight, "bias": bias}

    @torch.inference_mode()
    def _features(self) -> Tensor:
        module = self.backbone.build()
        module.load_state_dict({key: self.checkpoint.tensor(key).float() for key in module.state_dict()})
        module = self.engine.ready(module)
        prepared = map(self.backbone.prepare, self.engine.stream(self.data.split("train").inputs))
        with self.engine.running():
            return torch.cat([self.backbone.features(module, some).float().cpu() for some in prepared])


def probed(suite: Suite, checkpoint: Checkpoint, backbone: Any, engine: Engine) -> Suite:
    """The tasks that are merged, each under a linear probe of one model that all of them share; not cached.

    Raises UserError for a task that has no head.
    """
    tasks = []
    for task in suite.tasks:
        if not isinstance(task, LabelledTask) or task.head() is None:
            raise UserError(f"{task.name} has no head that a linear probe could stand in for: leave probe=true out.")
        tasks.append(replace(task, heads=Probe(checkpoint, backbone, task.data, None, engine)))
    return Suite(suite.name, tuple(tasks))


def fit_linear(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] fp32 of features [N, D] and labels [N]: classes from 0, or numbers (C = 1)."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    x, y = scaler.fit_transform(features.double().numpy()), labels.numpy()
    if labels.is_floating_point():
        fitted = Ridge(alpha=STRENGTH).fit(x, y)
        weight, bias = numpy.atleast_2d(fitted.coef_), numpy.atleast_1d(fitted.intercept_)
    else:
        fitted = LogisticRegression(C=STRENGTH, max_iter=STEPS).fit(x, y)
        weight, bias = fitted.coef_, fitted.intercept_
        if len(weight) == 1:  # of two classes scikit-learn gives the second one's
            weight, bias = numpy.concatenate([0 * weight, weight]), numpy.concatenate([0 * bias, bias])
    mean, spread = numpy.asarray(scaler.mean_), numpy.asarray(scaler.scale_)
    weight = numpy.asarray(weight / spread)
    bias = bias - weight @ mean
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
