"""Masks over the entries of a model that all its experts share, drawn at random and learned."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from merging.calibration import Calibration
from merging.experts import Experts
from merging.fit.coefficients import Coefficients, Shape, combination
from merging.fit.descent import Losses
from merging.fit.folded import Folded
from merging.ops import generator

Draw = Literal["relaxed", "discrete", "expected"]
EPS = torch.finfo(torch.float32).eps  # what torch.distributions keeps probabilities away from 0 and 1


def mask_of(logits: Tensor, draw: Draw, temperature: float, *seed: object) -> Tensor:
    """A mask of mean 1 from logits, of their shape, through which gradients flow unless it is discrete.

    draw: "relaxed", of a Concrete distribution, sigmoid((logit u + x) / temperature) with u uniform; "discrete",
    Bernoulli's 0 or 1; "expected", sigmoid(x). seed: the name of the draw.
    """
    if draw == "expected":
        mask = logits.sigmoid()
    else:
        uniform = torch.rand(logits.shape, generator=generator("mask", *seed)).clamp(EPS, 1 - EPS).to(logits.device)
        relaxed = ((uniform.logit() + logits) / temperature).sigmoid()
        mask = relaxed if draw == "relaxed" else (uniform < logits.sigmoid()).to(logits.dtype)
    return mask / mask.mean().clamp_min(1e-30)


class Masks(Folded):
    """Learnable (merging.fit): logits of a mask m for W_0 + m * sum_t lambda_t tau_t, drawn anew for every step.

    The coefficients lambda, `values` [T, P], are those at the start of `shape`, unless `inner` sets them in front of a
    step.
    """

    inner: Callable[[], Tensor] | None = None

    def __init__(self, experts: Experts, data: Calibration, shape: Shape, temperature: float, seed: int):
        super().__init__(experts, data, experts.stream)
        self.shape, self.temperature, self.seed, self.step = shape, temperature, seed, 0
        self.values = shape.made(shape.start).to(data.device)
        names, shapes = dict.fromkeys(map(self.first, self.changed)), experts.specs()
        self.logits = {key: torch.zeros(shapes[key].shape, device=data.device, requires_grad=True) for key in names}

    def mask(self, key: str) -> Tensor:
        """Of this step."""
        name = self.first(key)
        return mask_of(self.logits[name], "relaxed", self.temperature, self.seed, self.step, name)

    def masked(self, keys: Sequence[str] | None) -> Iterator[tuple[str, Tensor]]:
        """A stream (merging.fit.folded) of the task vectors behind the mask of this step."""
        for key, tau in self.stream(self.changed if keys is None else keys):
            yield key, self.mask(key).detach() * tau.to(self.data.device)

    def before(self, step: int) -> None:
        self.step = step
        if self.inner is not None:
            self.values = self.inner()

    def parameters(self) -> list[Tensor]:
        return [*self.logits.values()]

    def change(self, key: str, tau: Tensor) -> Tensor:
        return self.mask(key) * combination(self.values[:, self.shape.column[key]], tau)

    def pull(self, key: str, tau: Tensor, gradient: Tensor) -> None:
        self.change(key, tau).backward(gradient)

    def drawn(self, draw: Draw) -> Mapping[str, Tensor]:
        """The final mask of every parameter that it was learned for, on the CPU."""
        named = {
            name: mask_of(logits.detach(), draw, self.temperature, self.seed, "final", name).cpu()
            for name, logits in self.logits.items()
        }
        return {key: named[self.first(key)] for key in self.changed}


class Lookahead:
    """Coefficients that have gone a step of Adam from their start, on the mask of the step and on batches of their own.

    As in the authors' code the gradient is that at the coefficients of the step before, and Adam keeps its moments.
    """

    def __init__(self, masks: Masks, losses: Losses, lr: float):
        self.losses, self.start = losses, masks.shape.start
        self.model = Coefficients(masks.experts, masks.data, masks.masked, masks.shape)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.next(self.model)[0].backward()
        self.model.after()
        with torch.no_grad():
            self.model.free.copy_(self.start)
        self.optimizer.step()
        return self.model.values.detach()
