"""Gates: from what a sample looks like inside the network to the weights of a merge's parts."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from merging.errors import UserError
from merging.options import Count, Index, Options, Within
from merging.routing.neighbours import Neighbours

Sees = Literal["block", "early", "pass"]
Features = Literal["mean", "mean_std", "cls", "mean_std_cls"]
Activation = Literal["softmax", "sigmoid", "none", "soft_top_k"]
Granularity = Literal["sample", "token", "batch", "mixed", "group"]
Points = Literal["logits", "weights"]
WIDTHS: dict[str, int] = {"mean": 1, "mean_std": 2, "cls": 1, "mean_std_cls": 3}  # of features, in that of a token
_RECORDED: ContextVar[list[Tensor] | None] = ContextVar("recorded", default=None)


@contextmanager
def listening() -> Iterator[list[Tensor]]:
    """Collects what every gate of this thread answers, in order: [B, G], [B, N, G] per token, [G] per batch."""
    recorded: list[Tensor] = []
    token = _RECORDED.set(recorded)
    try:
        yield recorded
    finally:
        _RECORDED.reset(token)


def answered(weights: Tensor) -> Tensor:
    """The weights, noted for a listener. Raises UserError where they are not finite."""
    if torch.compiler.is_compiling():
        return weights
    if not weights.isfinite().all():
        raise UserError(
            "A gate gives NaN or Inf. Its training diverged or its input is not finite: lower router.train.lr, "
            "or check the merge and the samples."
        )
    recorded = _RECORDED.get()
    if recorded is not None:
        recorded.append(weights.detach())
    return weights


@dataclass(frozen=True)
class GateShape(Options, prefix="router.gate."):
    """What a gate looks like; as JSON in a saved model.

    sees: "block", every routed block has a gate that sees the tokens entering its first routed half (Duet, WEMoE);
    "early", one gate for the model sees the tokens before the first routed block, at no extra pass; "pass", one gate
    sees the last tokens of a static pass (Twin; doubles the work). after: the pass ends behind that many blocks, which
    costs their share; null: all. depth: 1 linear, 2 with a hidden ReLU layer (WEMoE), 3 the router of Twin-Merging.
    features: of the tokens, their mean, mean and deviation, the class token (of texts the first), or all three.
    pool: "before" the network or, for the mean alone, "after" it (WEMoE). shared: all blocks use one gate. activation:
    softmax, sigmoid, none (any real weights) or soft_top_k (of rank-one MoE: real weights s, times sigmoid(100 (s - the
    k-th largest))). temperature divides the logits. top_k: keep the k largest weights, or below 1 that share of the
    parts, rounded, at least one; those of softmax and sigmoid are rescaled to the same sum; 1 is hard routing, null
    changes nothing. The largest are chosen last, when the tokens, the batch or the group have been averaged.
    granularity: one w per "sample", per "token", for a "batch" of one task (as some published code does; it inflates),
    for a "mixed" batch of all tasks, or per "group" of similar samples of the whole test set (Twin-Merging's appendix
    E): samples with the same largest part, clustered by `points`, their "logits" as published or the "weights", into
    `groups` groups, of every part (per_bin) or of all parts together.
    standardise: features are centred and scaled by what they are on the training samples; False shows them raw, as the
    published gates see them. neighbours: in place of a network, the mean weights of that many samples that are nearest.
    """

    sees: Sees = "block"
    depth: Literal[1, 2, 3] = 1
    features: Features = "mean_std"
    pool: Literal["before", "after"] = "before"
    shared: bool = False
    activation: Activation = "softmax"
    temperature: Annotated[float, Within(0.0, math.inf, open_low=True)] = 1.0
    top_k: int | float | None = None
    granularity: Granularity = "sample"
    groups: Count = 20
    per_bin: bool = True
    points: Points = "logits"
    standardise: bool = True
    after: Index | None = None
    neighbours: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and not (0 < self.top_k < 1 or (self.top_k >= 1 and isinstance(self.top_k, int))):
            raise UserError(
                f"router.gate.top_k={self.top_k} is out of range: keep at least 1 part (a whole number), a share of "
                f"the parts between 0 and 1, or null for all."
            )
        if self.after is not None and self.sees != "pass":
            raise UserError(
                f"router.gate.after={self.after} ends a static pass, and router.gate.sees={self.sees} asks for none. "
                f"Set router.gate.sees=pass."
            )
        if self.by_token and self.features != "mean":
            raise UserError(
                f"router.gate.features={self.features} pools the tokens, but pool=after or granularity=token asks them "
                f"one by one. Set router.gate.features=mean."
            )
        if self.by_token and self.depth == 3:
            raise UserError(
                "router.gate.depth=3 normalises over samples and cannot be asked token by token (pool=after or "
                "granularity=token). Set router.gate.depth=1 or 2, or pool before it."
            )
        if self.granularity == "group" and self.sees == "block":
            raise UserError(
                "router.gate.granularity=group needs the weights of all samples before a merge: set "
                "router.gate.sees=early or pass."
            )
        if self.neighbours is not None and (self.by_token or self.depth != 1 or self.activation != "none"):
            raise UserError(
                f"router.gate.neighbours={self.neighbours} looks samples up in place of a network: set "
                f"router.gate.depth=1, activation=none, pool=before and no granularity=token."
            )
        if self.sees != "block" and (self.shared or self.granularity == "token"):
            raise UserError(
                f"router.gate.sees={self.sees} is one gate for the whole model: set router.gate.shared=false and "
                f"another router.gate.granularity, or router.gate.sees=block."
            )

    @property
    def by_token(self) -> bool:
        """Whether the network is asked once per token."""
        return self.pool == "after" or self.granularity == "token"

    def kept(self, parts: int) -> int:
        """How many of that many parts `top_k` keeps."""
        if self.top_k is None:
            return parts
        return min(self.top_k if isinstance(self.top_k, int) else max(1, round(self.top_k * parts)), parts)

    def used(self, parts: int) -> int:
        """How many of that many parts have a weight that is not zero; the soft choice leaves all of them a little."""
        return parts if self.activation == "soft_top_k" else self.kept(parts)

    def facts(self) -> dict[str, Any]:
        return asdict(self)


class Gate(nn.Module):
    """Tokens [B, N, d] -> weights [B, G] ([B, N, G] per token, [G] per batch), from features, standardised or raw."""

    def __init__(self, width: int, parts: int, shape: GateShape, init: float = 0.3):
        super().__init__()
        self.shape, self.parts = shape, parts
        inputs = WIDTHS[shape.features] * width
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.mean: Tensor
        self.std: Tensor
        if shape.neighbours is not None:
            self.net = nn.Sequential(Neighbours(inputs, parts, shape.neighbours))
            return
        self.net = network(inputs, parts, shape.depth)
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, init if shape.activation in ("none", "soft_top_k") else 0.0)

    def features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the network sees: [B, F], or [B, N, F] token by token. mask [B, N]: 0 where a token is padding."""
        if self.shape.by_token:
            return tokens
        first = tokens[:, 0] if mask is None else tokens[torch.arange(len(tokens)), mask.int().argmax(1)]
        if self.shape.features == "cls":
            return first
        mean = averaged(tokens, mask)
        if self.shape.features == "mean":
            return mean
        variance = averaged((tokens - mean[:, None]).square(), mask)
        deviation = variance.add(1e-12).sqrt()  # several times faster than std
        return torch.cat([mean, deviation] if self.shape.features == "mean_std" else [mean, deviation, first], -1)

    def standardise(self, features: Tensor) -> None:
        """Take mean and deviation from features [n, F], unless they are to be seen raw."""
        if not self.shape.standardise:
            return
        flat = features.flatten(0, -2)
        self.mean.copy_(flat.mean(0))
        self.std.copy_(flat.std(0, correction=0).clamp_min(1e-6))

    def logits(self, features: Tensor) -> Tensor:
        """Before the activation, [B, (N,) G]."""
        return self.net((features - self.mean) / self.std)

    def of_all(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weights of all parts: the activation of [B, (N,) G], averaged over tokens that share one w.

        soft_top_k is none here, as the published order is to average the real weights and then to choose.
        """
        logits = logits / self.shape.temperature
        activate = {"softmax": lambda: logits.softmax(-1), "sigmoid": logits.sigmoid}
        weights = activate.get(self.shape.activation, lambda: logits)()
        return averaged(weights, mask) if weights.ndim == 3 and self.shape.granularity != "token" else weights

    def chosen(self, weights: Tensor, hard: bool = True) -> Tensor:
        """The `top_k` largest of [..., G]; without `hard` all but softly chosen ones, as a zero has no gradient."""
        most, activation = self.shape.kept(self.parts), self.shape.activation
        if most == self.parts:
            return weights
        if activation == "soft_top_k":
            return weights * (100 * (weights - weights.topk(most, -1).values[..., -1:])).sigmoid()
        if not hard:
            return weights
        kept = largest(weights, most)
        if activation == "none":
            return kept
        shares = kept / kept.sum(-1, keepdim=True)  # exactly one-hot for one
        return shares * weights.sum(-1, keepdim=True) if activation == "sigmoid" else shares

    def weights(self, logits: Tensor, hard: bool = True) -> Tensor:
        """What logits [B, (N,) G] give: [B, G], or [B, N, G] where every token has its own."""
        return self.chosen(self.of_all(logits), hard)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        weights = self.of_all(self.logits(self.features(tokens, mask)), mask)
        return answered(self.chosen(weights.mean(0) if self.shape.granularity in ("batch", "mixed") else weights))

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates for one sample."""
        size = sum(layer.weight.numel() for layer in self.net if isinstance(layer, nn.Linear))
        size += sum(layer.macs for layer in self.net if isinstance(layer, Neighbours))
        return size * (tokens if self.shape.by_token else 1)


def averaged(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over tokens of [B, N, d], padding (where mask [B, N] is 0) left out."""
    return x.mean(1) if mask is None else (x * mask[..., None].to(x.dtype) / mask.sum(1)[:, None, None]).sum(1)


def network(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    """One linear layer, WEMoE's two, or Twin-Merging's three (with batch normalisation and dropout)."""
    if depth == 3:
        wide = 2 * inputs
        hidden = [
            [nn.Linear(size, wide), nn.BatchNorm1d(wide), nn.LeakyReLU(), nn.Dropout(0.5)] for size in (inputs, wide)
        ]
        return nn.Sequential(*hidden[0], *hidden[1], nn.Linear(wide, outputs))
    layers = [nn.Linear(inputs, inputs), nn.ReLU()] if depth == 2 else []
    net = nn.Sequential(*layers, nn.Linear(inputs, outputs))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
    return net


def largest(weights: Tensor, count: int) -> Tensor:
    """The `count` largest of [..., G]; the rest zero."""
    if count >= weights.shape[-1]:
        return weights
    values, where = weights.topk(count, -1)
    return torch.zeros_like(weights).scatter(-1, where, values)


class Subspace(nn.Module):
    """SMILE's gate of one linear layer: how much of a token lies in the leading input directions of each part.

    directions [G, k, n]; x [B, N, n] -> softmax of the lengths [B, N, G], the `top_k` largest kept, summing to 1.
    """

    def __init__(self, directions: Tensor, top_k: int = 1):
        super().__init__()
        self.register_buffer("directions", directions)
        self.directions: Tensor
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        inside = nn.functional.linear(x, self.directions.flatten(0, 1)).unflatten(-1, self.directions.shape[:2])
        kept = largest(inside.norm(dim=-1).softmax(-1), self.top_k)
        return answered(kept / kept.sum(-1, keepdim=True))

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates for one sample."""
        return tokens * self.directions.numel()
