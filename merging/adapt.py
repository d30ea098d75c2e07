"""Trains gates without class labels, on images whose task is known: by task id, entropy, or agreement with experts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from merging.calibration import Calibration
from merging.context import Context
from merging.errors import UserError
from merging.experts import Experts
from merging.losses import Watch, expert_features, marginal_entropy, mean_entropy, task_loss
from merging.merged import Merged, Routing
from merging.ops import generator
from merging.preflight import check_range
from merging.routing.gate_features import features_of, show_gates
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
class TaskId:
    """Cross-entropy with the task of each image, gate after gate: one pass over the images, no class labels.

    A gate is fitted on what the network shows it when the gates before it already route. lr, steps, batch: of Adam
    on the standardised features. weight_decay: 0 trusts every feature.
    """

    steps: int = 100
    batch: int = 256
    lr: float = 0.02
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_range("router.train.steps", self.steps, 1, 10**7)
        check_range("router.train.batch", self.batch, 1, 10**6)
        check_range("router.train.lr", self.lr, 0.0, 1.0, open_low=True)

    def train(
        self, tower: Routed, merged: Merged, experts: Experts, calibration: Calibration, context: Context
    ) -> list[str]:
        """Fit the gates of `tower` in place; the context's log hears the last loss of each."""
        tasks = torch.repeat_interleave(torch.arange(len(merged.tasks)), torch.tensor(calibration.sizes))
        tasks = tasks.to(calibration.device)
        losses: list[float] = []

        def fit(gate: Gate, features: Tensor) -> None:
            losses.append(self._fit(gate, features, tasks, len(merged.tasks), context.seed))
            context.log({"router/task_id": losses[-1]}, len(losses) - 1)

        show_gates(tower, calibration, merged, fit)
        return []

    def _fit(self, gate: Gate, features: Tensor, tasks: Tensor, count: int, seed: int) -> float:
        gate.standardise(features)
        gate.train()
        optimizer = torch.optim.AdamW(gate.net.parameters(), self.lr, weight_decay=self.weight_decay)
        rng, tasks, loss = generator("task_id", seed), tasks.repeat(len(features) // len(tasks)), torch.zeros(())
        for step in range(self.steps):
            some = torch.randint(len(features), (min(self.batch, len(features)),), generator=rng)
            for group in optimizer.param_groups:
                group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
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
class Gradient:
    """Descends through the whole network, gates alone. The loss is a sum over tasks of weighted terms.

    entropy: mean entropy of the class predictions (the loss of WEMoE and Duet). marginal: minus the entropy of the
    mean prediction, against collapse. distillation: 1 - cosine of the features to the matching expert's. warm_up:
    TaskId before it, null for a start at the gates' initial weights. batch: images per task and step. schedule: cosine
    or constant.
    """

    entropy: float = 1.0
    marginal: float = 0.0
    distillation: float = 0.0
    warm_up: TaskId | None = None
    steps: int = 1000
    batch: int = 16
    lr: float = 1.0e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_range("router.train.steps", self.steps, 1, 10**7)
        check_range("router.train.batch", self.batch, 1, 10**6)
        check_range("router.train.lr", self.lr, 0.0, 1.0, open_low=True)
        if self.schedule not in ("cosine", "constant"):
            raise UserError(f"router.train.schedule={self.schedule!r} is unknown. Choose cosine or constant.")

    def train(
        self, tower: Routed, merged: Merged, experts: Experts, calibration: Calibration, context: Context
    ) -> list[str]:
        """Train the gates of `tower` in place; returns the tasks that the collapse guard suspects."""
        count = len(merged.tasks)
        if self.warm_up is not None:
            self.warm_up.train(tower, merged, experts, calibration, context)
        elif merged.routing is not None and merged.routing.gate is not None and merged.routing.gate.standardise:
            show_gates(tower, calibration, merged, lambda gate, features: gate.standardise(features))
        targets = expert_features(experts, calibration) if self.distillation else None
        draws = [calibration.drawn(task, self.batch, context.seed) for task in range(count)]
        gates = merged.routing.gates if merged.routing is not None else None
        assert gates is not None
        parameters = [each for gate in gates for each in gate.net.parameters()]  # type: ignore[union-attr]
        optimizer = torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay)
        watch = Watch(merged.tasks)
        for step in range(self.steps):
            chosen = [next(draw) for draw in draws]
            if self.schedule == "cosine":
                optimizer.param_groups[0]["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            optimizer.zero_grad(set_to_none=True)
            features = features_of(tower, merged, calibration, chosen)
            loss, terms = self._loss(features, calibration, chosen, targets, watch)
            loss.backward()
            optimizer.step()
            if not loss.isfinite():
                raise UserError(f"The router's loss is {loss.item()} at step {step}: lower router.train.lr={self.lr}.")
            context.log({f"router/{name}": value for name, value in terms.items()}, step)
        return watch.collapsed()

    def _loss(
        self,
        features: Sequence[Tensor],
        calibration: Calibration,
        chosen: list[Tensor],
        targets: list[Tensor] | None,
        watch: Watch,
    ) -> tuple[Tensor, dict[str, float]]:
        terms: dict[str, Tensor] = dict.fromkeys(("entropy", "marginal", "distillation"), torch.zeros(()))
        for task, (found, head) in enumerate(zip(features, calibration.heads, strict=True)):
            logits = found @ head.T
            watch.note(task, logits)
            terms["entropy"] = terms["entropy"] + mean_entropy(logits)
            terms["marginal"] = terms["marginal"] - marginal_entropy(logits)
            if targets is not None:
                gap = 1 - (found * targets[task][chosen[task]]).sum(-1).mean()
                terms["distillation"] = terms["distillation"] + gap
        loss = sum((getattr(self, name) * term for name, term in terms.items()), torch.zeros(()))
        return loss, {name: float(term.detach()) for name, term in terms.items()}


@dataclass(frozen=True)
class Learned:
    """A gate of some shape, trained on unlabelled images. split: "test" is transductive."""

    name: str = "task_id"
    gate: GateShape = field(default_factory=GateShape)
    train: TaskId | Gradient = field(default_factory=TaskId)
    split: Literal["train", "val", "calibration", "test"] = "calibration"

    def __post_init__(self) -> None:
        self._check_kept(self.gate.top_k)

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
        with seeded(context.seed):  # towers start at random weights, and a gate may have dropout
            return self._fit(merged, experts, context)

    @property
    def sees_own(self) -> bool:
        """Whether what it learns depends on the task-specific parts: tokens before them, or of a pass without them,
        do not."""
        return self.gate.sees == "block" or isinstance(self.train, Gradient)

    def restored(self, merged: Merged, gates: Mapping[str, Tensor]) -> Merged:
        """What `fit` gave, from the state dict of its gates."""
        count = len({key.partition(".")[0] for key in gates})
        return self._with(merged, rebuilt_gates(gates, self.gate, count, merged.parts), self.split)

    def _with(self, merged: Merged, gates: nn.ModuleList | None, split: str) -> Merged:
        assert merged.routing is not None
        routing = replace(
            merged.routing, router=self.name, granularity=self.gate.granularity, gate=self.gate, gates=gates,
            adaptation=split,
        )  # fmt: skip
        return replace(merged, routing=routing)

    def _fit(self, merged: Merged, experts: Experts, context: Context) -> tuple[Merged, list[str]]:
        calibration = context.unlabelled(self.split)
        tower = install(calibration.tower(), merged)
        width = tower.tokens(("enter", 0), calibration.images(0, torch.arange(1)).cpu()).shape[-1]
        gates = self._gates(tower, merged, width, context.seed)
        trained = self._with(merged, gates, calibration.split)
        assert trained.routing is not None
        attach(tower, trained.routing)
        collapsed = self.train.train(tower.to(calibration.device), trained, experts, calibration, context)
        gates.cpu().requires_grad_(False)
        return trained, collapsed

    def _gates(self, tower: Routed, merged: Merged, width: int, seed: int) -> nn.ModuleList:
        if self.gate.sees != "pass" and tower.first_routed < 0:
            raise UserError(
                f"router.gate.sees={self.gate.sees} cannot weigh what comes before the blocks (patches, positions). "
                f"Set router.gate.sees=pass, or keep the stem static: method.start=0."
            )
        if self.gate.top_k is not None:  # a share is known now
            self._check_kept(self.gate.kept(merged.parts))
        routed = sum(1 for block in tower.blocks if block.routed)
        count = routed if self.gate.sees == "block" and not self.gate.shared else 1
        init = merged.routing.init if merged.routing else 0.0
        torch.manual_seed(seed)  # whatever the tower has drawn
        return nn.ModuleList([Gate(width, merged.parts, self.gate, init).eval() for _ in range(count)])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generators, which layers draw from, start at `seed` and are put back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
