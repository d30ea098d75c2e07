"""Free coefficients of task vectors, W_0 + sum_t lambda_t tau_t: one per task, or one per task and parameter."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merging.cache import code, key_of, modules_of
from merging.calibration import Calibration
from merging.context import Context
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.descent import Descent, descend, seeded
from merging.fit.samples import Samples
from merging.identity import identity
from merging.options import Options, snake_case
from merging.preflight import some

CODE = ("merging.fit", "merging.methods.ties", "merging.backbones")

# (key, tau [T, *shape]) of some keys, or all, in a fixed order; a buffer used again
Stream = Callable[[Sequence[str] | None], Iterator[tuple[str, Tensor]]]


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


def weights_of(experts: Experts, module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model, under all their names. Raises UserError for some that base and experts lack."""
    weights = dict(module.named_parameters(remove_duplicate=False))
    stored = experts.origin.specs()
    lacking = [name for name in weights if name not in stored]
    if lacking or not weights:
        raise UserError(
            f"The model has {some(lacking) or 'no parameter'}, which base and experts lack: what they give is not "
            f"known, so that nothing can be learned from it. Give the backbone that the checkpoints are of."
        )
    return weights


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


class Coefficients:
    """Learnable (merging.fit): `free`, of which `shape` makes the coefficients `values` [T, P].

    A step folds them into one model, and after the backward pass projects the gradient of every weight onto its task
    vectors: beside the model and its gradients one parameter of all experts is in memory.
    """

    def __init__(self, experts: Experts, data: Calibration, stream: Stream, shape: Shape):
        self.experts, self.data, self.stream, self.tasks, self.shape = experts, data, stream, experts.tasks, shape
        self.free = shape.start.detach().clone().to(data.device).requires_grad_()
        self.module = data.tower().to(data.device)
        self._weights = weights_of(experts, self.module)
        self.module.load_state_dict({key: experts.origin.tensor(key) for key in self.module.state_dict()})
        self._changed = [key for key, tau in stream(None) if tau.any()] or list(shape.column)
        self.module.requires_grad_(False)  # of what no expert has changed no coefficient can
        for key in self._weights.keys() & self._changed:
            self._weights[key].requires_grad_()

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

    def features(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        """[n, D] of the inputs of every task, one task after the other."""
        self._fold()
        return [self.data.features(self.module, some) for some in inputs]

    def _fold(self) -> None:
        """Put W_0 + sum_t lambda_t tau_t into the module."""
        state = self.module.state_dict()
        with torch.no_grad():
            if self.shape.clamp:
                self.free.clamp_(0, 1)
            values = self.values
            for key, tau in self.stream(self._changed):
                if key in state:
                    change = combination(values[:, self.shape.column[key]], tau.to(values.device))
                    state[key].copy_(self.experts.base(key).to(change.device) + change)
        for weight in self._weights.values():
            weight.grad = None

    def after(self) -> None:
        """The gradient of lambda[t, l], the inner product of that of the weight with tau_t, goes on to what is free."""
        values = self.values
        gradient = torch.zeros_like(values)
        for key, tau in self.stream(self._changed):
            weight, column = self._weights.get(key), self.shape.column[key]
            if weight is not None and weight.grad is not None:
                pairs = (chunked(tensor, column.stop - column.start) for tensor in (tau, weight.grad[None]))
                for index, (piece, of_weight) in enumerate(zip(*pairs, strict=True), column.start):
                    gradient[:, index] += piece.to(gradient.device) @ of_weight[0]
        values.backward(gradient)


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
    method: Learning, experts: Experts, context: Context, stream: Stream, shape: Shape, samples: Samples
) -> tuple[Tensor, tuple[str, ...]]:
    """Coefficients [T, P] after the descent of a method, and what is to be said of it; learned once per content.

    Raises UserError where the loss is not finite.
    """
    data, name = samples.data, snake_case(type(method).__name__)

    def descended() -> dict[str, Tensor]:
        with seeded(context.seed):  # a module starts at random weights
            model = Coefficients(experts, data, stream, shape)
        collapsed = descend(model, context, experts, method.train, data.split, name, samples)
        return {"values": model.learned, "collapsed": torch.tensor([task in collapsed for task in experts.tasks])}

    if experts.cache is None:
        learned = descended()
    else:
        ids = [experts.origin.id, *(checkpoint.id for checkpoint in experts.checkpoints)]
        seen = (data.split, data.ids, data.head_ids, data.backbone, data.device.type, data.precision)
        form = shape.start, {key: [column.start, column.stop] for key, column in shape.column.items()}
        made_from = (identity(method), ids, sorted(experts.specs()), seen, identity(form), context.seed)
        learned = experts.cache.tensors(
            key_of("coefficients", code((*CODE, *modules_of(method))), *made_from), descended
        )
    names = zip(experts.tasks, learned["collapsed"].tolist(), strict=True)
    suspected = ", ".join(task for task, fell in names if fell)
    return learned["values"], (f"suspected of collapse: {suspected}",) if suspected else ()
