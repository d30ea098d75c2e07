"""Free coefficients of task vectors, W_0 + sum_t lambda_t tau_t: one per task, or one per task and parameter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merging.cache import code, key_of, modules_of
from merging.calibration import Calibration
from merging.context import Context
from merging.experts import Experts
from merging.fit.descent import Descent, descend, seeded, suspicion
from merging.fit.folded import Folded, Stream
from merging.fit.samples import Samples
from merging.identity import identity
from merging.options import Options, snake_case

CODE = ("merging.fit", "merging.methods.ties", "merging.backbones")


def columns(experts: Experts, by_parameter: bool = True, chunks: Mapping[str, int] | None = None) -> dict[str, slice]:
    """The columns of coefficients of every parameter: one for all, or one for each, or as many as it has chunks.

    Tied names share theirs.
    """
    tied, column, first = experts.tied, {}, 0
    for key in experts.specs():
        if key not in tied:
            column[key] = slice(first, first + (1 if chunks is None else chunks[key]))
            first = column[key].stop if by_parameter else 0
    return column | {key: column[known] for key, known in tied.items() if known in column}


def combination(values: Tensor, tau: Tensor) -> Tensor:
    """sum_t values[t] tau_t of [T, *shape]: values [T, 1], or [T, m] for m flat chunks of the parameter."""
    if values.shape[1] == 1:
        return torch.tensordot(values[:, 0], tau, 1)
    pieces = zip(values.T, chunked(tau, values.shape[1]), strict=False)  # some counts of chunks leave the last empty
    return torch.cat([value @ piece for value, piece in pieces]).view(tau.shape[1:])


def chunked(tau: Tensor, count: int) -> tuple[Tensor, ...]:
    """The flattened entries of [T, *shape] in `count` parts of equal length, the last one shorter, as torch.chunk."""
    return tau.flatten(1).chunk(count, 1)


@dataclass(frozen=True)
class Shape:
    """What coefficients [T, P] are: `column`, see `columns`, and what makes them of the free numbers, whose start is
    `start`. penalty: of the coefficients, added to the loss. clamp: keep the free numbers in [0, 1]."""

    column: Mapping[str, slice]
    start: Tensor  # [T, ...]
    made: Callable[[Tensor], Tensor] = lambda free: free
    penalty: Callable[[Tensor], Tensor] | None = None
    clamp: bool = False

    @classmethod
    def constant(cls, experts: Experts, column: Mapping[str, slice], value: float, **options: Any) -> "Shape":
        """All start at one value."""
        count = max((columns.stop for columns in column.values()), default=1)
        return cls(column, torch.full((len(experts.tasks), count), value), **options)


class Coefficients(Folded):
    """Learnable (merging.fit): `free`, of which `shape` makes the coefficients `values` [T, P] of the task vectors."""

    def __init__(self, experts: Experts, data: Calibration, stream: Stream, shape: Shape):
        super().__init__(experts, data, stream)
        self.shape = shape
        self.free = shape.start.detach().clone().to(data.device).requires_grad_()
        self._known = self._gradient = self.values.detach()  # of the coefficients, while weights are gone through

    @property
    def values(self) -> Tensor:
        """The coefficients [T, P], as a function of the free numbers."""
        return self.shape.made(self.free)

    @property
    def learned(self) -> Tensor:
        """The coefficients, on the CPU."""
        free = self.free.detach()
        return self.shape.made(free.clamp(0, 1) if self.shape.clamp else free).cpu()

    def parameters(self) -> list[Tensor]:
        return [self.free]

    def penalty(self) -> Tensor:
        """What is added to the loss."""
        return self.free.new_zeros(()) if self.shape.penalty is None else self.shape.penalty(self.values)

    @torch.no_grad()
    def fold(self) -> None:
        if self.shape.clamp:
            self.free.clamp_(0, 1)
        self._known = self.values
        super().fold()

    def change(self, key: str, tau: Tensor) -> Tensor:
        return combination(self._known[:, self.shape.column[key]], tau)

    def pull(self, key: str, tau: Tensor, gradient: Tensor) -> None:
        """Of lambda[t, l] it is the inner product with tau_t."""
        column = self.shape.column[key]
        pairs = (chunked(tensor, column.stop - column.start) for tensor in (tau, gradient[None]))
        for index, (piece, of_weight) in enumerate(zip(*pairs, strict=True), column.start):
            self._gradient[:, index] += piece @ of_weight[0]

    def after(self) -> None:
        """The gradients of the weights, as those of the coefficients, go on to what is free."""
        values = self.values
        self._gradient = torch.zeros_like(values)
        super().after()
        values.backward(self._gradient)


class Learning(Options):
    """Mixin of methods that learn by a descent, `train`, from samples of one split."""

    train: Descent
    split: str

    @property
    def needs(self) -> str:  # labels where an objective compares with them
        return self.train.needs

    @property
    def splits(self) -> tuple[str, ...]:
        return (self.split,)


def learn(
    method: Learning, experts: Experts, context: Context, stream: Stream, shape: Shape, samples: Samples,
    kind: Callable[..., Coefficients] = Coefficients,
) -> tuple[Tensor, tuple[str, ...]]:  # fmt: skip
    """Coefficients [T, P] after the descent of a method, and what is to be said of it; learned once per content.

    kind: what makes the model whose `learned` they are. Raises UserError where the loss is not finite.
    """
    data, name = samples.data, snake_case(type(method).__name__)

    def descended() -> dict[str, Tensor]:
        with seeded(context.seed):  # a module starts at random weights
            model = kind(experts, data, stream, shape)
        collapsed = descend(model, context, experts, method.train, data.split, name, samples)
        return {"values": model.learned, "collapsed": torch.tensor([task in collapsed for task in experts.tasks])}

    if experts.cache is None:
        learned = descended()
    else:
        ids = [experts.origin.id, *(checkpoint.id for checkpoint in experts.checkpoints)]
        seen = (data.split, data.ids, data.head_ids, data.backbone, data.device.type, data.precision)
        form = shape.start, {key: [column.start, column.stop] for key, column in shape.column.items()}
        made_from = (identity(method), ids, experts.tasks, sorted(experts.specs()), seen, identity(form), context.seed)
        learned = experts.cache.tensors(
            key_of("coefficients", code((*CODE, *modules_of(method))), *made_from), descended
        )
    names = zip(experts.tasks, learned["collapsed"].tolist(), strict=True)
    return learned["values"], suspicion([task for task, fell in names if fell])
