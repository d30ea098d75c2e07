"""Routers: how the gates of a merge learn, without class labels unless an objective asks for them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging.calibration import Calibration
from merging.context import Context
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.descent import Descent, cosine, descend, seeded
from merging.fit.discriminant import calibrated
from merging.fit.metric import learned_metric
from merging.merged import Merged, Routing
from merging.ops import generator
from merging.options import Count, Options, Rate, Within
from merging.routing.gate_features import applied, features_of, show_gates
from merging.routing.gates import Gate, GateShape
from merging.routing.install import attach, install
from merging.routing.routed import Routed
from merging.saving import rebuilt_gates


class Router(Protocol):
    """Turns a merge whose deltas wait for weights into one that knows where they come from."""

    @property
    def name(self) -> str: ...

    def fit(self, merged: Merged, experts: Experts, context: Context) -> tuple[Merged, list[str]]: ...

    def restored(self, merged: Merged, gates: Mapping[str, Tensor]) -> Merged: ...


@dataclass(frozen=True)
class Oracle:
    """The true task id chooses: the ceiling of every router."""

    name: str = "oracle"

    def fit(self, merged: Merged, experts: Experts, context: Context) -> tuple[Merged, list[str]]:
        """The merge, routed by the true task; nothing is trained."""
        return replace(merged, routing=Routing("oracle")), []

    def restored(self, merged: Merged, gates: Mapping[str, Tensor]) -> Merged:
        """The same; there are no gates."""
        return replace(merged, routing=Routing("oracle"))


@dataclass(frozen=True)
class TaskId(Options, prefix="router.train."):
    """Cross-entropy with the task of each input, gate after gate: one pass over the inputs, no class labels.

    A gate is fitted on what the network shows it when the gates before it already route. lr, steps, batch: of Adam
    on the standardised features. weight_decay: 0 trusts every feature.
    """

    steps: Annotated[int, Within(1, 10**7)] = 100
    batch: Annotated[int, Within(1, 10**6)] = 256
    lr: Rate = 0.02
    weight_decay: float = 0.01

    def train(self, model: "Gates", experts: Experts, context: Context, split: str) -> list[str]:
        """Fit the gates in place; the context's log gets the last loss of each."""
        return by_task(model, context, partial(self._fit, seed=context.seed))

    def _fit(self, gate: Gate, features: Tensor, tasks: Tensor, count: int, seed: int) -> float:
        gate.train()
        optimizer = torch.optim.AdamW(gate.net.parameters(), self.lr, weight_decay=self.weight_decay)
        rng, loss = generator("task_id", seed), torch.zeros(())
        for step in range(self.steps):
            some = torch.randint(len(features), (min(self.batch, len(features)),), generator=rng)
            optimizer.param_groups[0]["lr"] = cosine(self.lr, step, self.steps)
            weights = gate.weights(gate.logits(features[some]), hard=False)
            loss = task_loss(
                weights.mean(1) if weights.ndim == 3 else weights, tasks[some], count, gate.shape.activation
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        gate.eval()
        return loss.item()


@dataclass(frozen=True)
class Discriminant(Options, prefix="router.train."):
    """As TaskId for linear softmax gates, in closed form and with nothing to choose: merging.fit.discriminant."""

    def train(self, model: "Gates", experts: Experts, context: Context, split: str) -> list[str]:
        """Solve for the gates in place; the context's log gets the cross-entropy of each."""
        return by_task(model, context, self._fit)

    @torch.no_grad()
    def _fit(self, gate: Gate, features: Tensor, tasks: Tensor, count: int) -> float:
        """Raises UserError for a merge with several parts a task."""
        if gate.parts != count:
            raise UserError(
                f"router=discriminant tells {count} tasks apart, and this merge mixes {gate.parts} parts: set "
                f"router=task_id."
            )
        standardised, layer = (features - gate.mean) / gate.std, gate.net[-1]
        weight, bias = calibrated(standardised.double().cpu(), tasks.cpu(), count)
        layer.weight.copy_(weight), layer.bias.copy_(bias)  # type: ignore[operator]
        return functional.cross_entropy(gate.logits(features), tasks).item()


@dataclass(frozen=True)
class Retrieval(Options, prefix="router.train."):
    """Nothing is trained but a metric: gates with `neighbours` keep what they see of samples, and the tasks of these.

    Auto-Switch (Qi et al., 2025, arXiv 2412.00054). samples: of each task the first so many, null for all. rank: null,
    Euclidean distances; a number, those of so many directions learned from the samples, the idea of Auto-FlexSwitch
    (arXiv 2604.28109, about 32) by a loss of ours: see merging.fit.metric.
    """

    samples: Count | None = 100
    rank: Count | None = None

    def train(self, model: "Gates", experts: Experts, context: Context, split: str) -> list[str]:
        """Fill the gates in place; the context's log gets the share of other tasks among each one's neighbours."""
        return by_task(model, context, self._fit)

    @torch.no_grad()
    def _fit(self, gate: Gate, features: Tensor, tasks: Tensor, count: int) -> float:
        some = torch.cat([(tasks == task).nonzero()[: self.samples, 0] for task in range(count)])
        samples, labels = (features[some] - gate.mean) / gate.std, tasks[some]
        own = functional.one_hot(labels, count).to(samples.dtype)
        metric = None if self.rank is None else learned_metric(samples, labels, self._checked(samples.shape[1]))
        gate.net[-1].keep(samples, own.repeat_interleave(gate.parts // count, 1), metric)  # type: ignore[operator]
        shares = gate.logits(features[some]).unflatten(1, (count, -1))[..., 0]
        return 1 - (shares * own).sum(1).mean().item()

    def _checked(self, width: int) -> int:
        """The rank. Raises UserError where features have fewer numbers."""
        assert self.rank is not None
        if self.rank > width:
            raise UserError(
                f"router.train.rank={self.rank} directions are more than the {width} numbers that the gate sees of a "
                f"sample. Set router.train.rank={width} or less, or null for Euclidean distances."
            )
        return self.rank


def by_task(model: "Gates", context: Context, fit: Callable[[Gate, Tensor, Tensor, int], float]) -> list[str]:
    """`fit`(gate, features, their tasks, number of tasks) gate after gate, its loss logged; it suspects no task."""
    tasks = torch.repeat_interleave(torch.arange(len(model.tasks)), torch.tensor(model.data.sizes))
    tasks = tasks.to(model.data.device)
    losses: list[float] = []

    def act(gate: Gate, features: Tensor) -> None:
        gate.standardise(features)
        losses.append(fit(gate, features, tasks.repeat(len(features) // len(tasks)), len(model.tasks)))
        context.log({"router/task_id": losses[-1]}, len(losses) - 1)

    show_gates(model.module, model.data, model.merged, act)
    return []


@dataclass(frozen=True)
class Gradient(Descent):
    """Descends through the whole network, gates alone. warm_up: TaskId before it, null for a start at initial weights.

    The entropy objective is the loss of WEMoE and Duet.
    """

    warm_up: TaskId | None = None

    def train(self, model: "Gates", experts: Experts, context: Context, split: str) -> list[str]:
        """Train the gates in place; returns the tasks that the collapse guard suspects."""
        shape = model.merged.routing.gate if model.merged.routing is not None else None
        if self.warm_up is not None:
            self.warm_up.train(model, experts, context, split)
        elif shape is not None and shape.standardise:
            show_gates(model.module, model.data, model.merged, lambda gate, features: gate.standardise(features))
        return descend(model, context, experts, self, split, "router")


class Gates:
    """Learnable (merging.fit): the gates of a routed model."""

    def __init__(self, module: Routed, merged: Merged, data: Calibration):
        self.module, self.merged, self.data, self.tasks = module, merged, data, merged.tasks

    def parameters(self) -> list[Tensor]:
        return [parameter for gate in self.module.gates for parameter in gate.net.parameters()]  # type: ignore[union-attr]

    def features(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        return features_of(self.module, self.merged, self.data, inputs)

    def after(self) -> None:
        """Gates have their gradients."""


@dataclass(frozen=True)
class Learned:
    """A gate of some shape, trained on unlabelled inputs. split: "test" is transductive."""

    name: str = "task_id"
    gate: GateShape = field(default_factory=GateShape)
    train: TaskId | Discriminant | Retrieval | Gradient = field(default_factory=TaskId)
    split: Literal["train", "val", "calibration", "test"] = "calibration"

    def __post_init__(self) -> None:
        self._check_kept(self.gate.top_k)
        linear = self.gate.depth == 1 and not self.gate.by_token and self.gate.activation == "softmax"
        if isinstance(self.train, Discriminant) and not linear:
            raise UserError(
                "router=discriminant solves for a linear gate whose softmax weighs samples: set router.gate.depth=1, "
                "pool=before, activation=softmax and no granularity=token, or router=task_id."
            )
        if isinstance(self.train, Retrieval) != (self.gate.neighbours is not None):
            raise UserError(
                "Gates that look samples up are filled, not trained: router.gate.neighbours and "
                "router.train=merging.fit.gates.Retrieval belong together, as router=retrieval sets them."
            )

    def _check_kept(self, count: float | None) -> None:
        """Raises UserError where one-hot weights would have to be trained."""
        if count == 1 and self.gate.activation == "softmax" and isinstance(self.train, Gradient):
            raise UserError(
                f"router.gate.top_k={self.gate.top_k} gives one-hot weights, through which no loss of the model can "
                f"train a gate. Keep two parts or more (router.gate.top_k=2), or train by task id: router=task_id."
            )

    def fit(self, merged: Merged, experts: Experts, context: Context) -> tuple[Merged, list[str]]:
        """The merge with trained gates, and the tasks that the collapse guard suspects.

        Raises UserError for a merge whose stem is routed and a gate that would have to see it first.
        """
        with seeded(context.seed):  # models start at random weights, and a gate may have dropout
            return self._fit(merged, experts, context)

    @property
    def sees_deltas(self) -> bool:
        """Whether what it learns depends on the task-specific deltas; tokens before or without them do not."""
        return self.gate.sees == "block" or isinstance(self.train, Gradient)

    def restored(self, merged: Merged, gates: Mapping[str, Tensor]) -> Merged:
        """What `fit` gave, from the state dict of its gates."""
        count = len({key.partition(".")[0] for key in gates})
        return self._with(merged, rebuilt_gates(gates, self.gate, count, merged.parts), self.split)

    def _with(self, merged: Merged, gates: nn.ModuleList | None, split: str) -> Merged:
        assert merged.routing is not None
        gate = {"granularity": self.gate.granularity, "gate": self.gate, "gates": gates}
        return replace(merged, routing=replace(merged.routing, router=self.name, adaptation=split, **gate))

    def _fit(self, merged: Merged, experts: Experts, context: Context) -> tuple[Merged, list[str]]:
        data = context.unlabelled(self.split)
        routed = install(data.tower(), merged).to(data.device)
        width = applied(partial(routed.tokens, ("enter", 0)), data.inputs(0, torch.arange(1))).shape[-1]
        gates = self._gates(routed, merged, width, context.seed)
        trained = self._with(merged, gates, data.split)
        assert trained.routing is not None
        attach(routed, trained.routing)
        model = Gates(routed.to(data.device), trained, data)
        collapsed = self.train.train(model, experts, context, self.split)
        gates.cpu().requires_grad_(False)
        return trained, collapsed

    def _gates(self, routed: Routed, merged: Merged, width: int, seed: int) -> nn.ModuleList:
        if self.gate.top_k is not None:  # a share is known now
            self._check_kept(self.gate.kept(merged.parts))
        count = routed.gates_of(self.gate)
        init = merged.routing.init if merged.routing else 0.0
        torch.manual_seed(seed)  # whatever the model has drawn
        return nn.ModuleList([Gate(width, merged.parts, self.gate, init).eval() for _ in range(count)])


def task_loss(weights: Tensor, tasks: Tensor, count: int, activation: str) -> Tensor:
    """How far weights [B, G] are from one-hot at `tasks` [B]; the components of a task count together.

    softmax: cross-entropy; sigmoid: binary cross-entropy; real weights: mean squared error, components averaged.
    """
    components = weights.unflatten(-1, (count, -1))
    if activation == "softmax":
        return functional.nll_loss(components.sum(-1).clamp_min(1e-12).log(), tasks)
    truth = functional.one_hot(tasks, count).to(weights.dtype)
    if activation == "sigmoid":
        return functional.binary_cross_entropy(components.mean(-1), truth)
    return functional.mse_loss(components.mean(-1), truth)
