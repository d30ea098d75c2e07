"""Free coefficients of task vectors, W_0 + sum_t lambda_t tau_t: one per task, or one per task and parameter."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from merging.calibration import Calibration
from merging.errors import UserError
from merging.experts import Experts
from merging.preflight import some

# (key, tau [T, *shape]) of some keys, or all, in a fixed order; a buffer used again
Stream = Callable[[Sequence[str] | None], Iterator[tuple[str, Tensor]]]


def columns(experts: Experts, by_parameter: bool) -> dict[str, int]:
    """The column of coefficients of every parameter: one for all, or one for each; tied names share theirs."""
    tied = experts.tied
    keys = [key for key in experts.specs() if key not in tied]
    column = {key: index if by_parameter else 0 for index, key in enumerate(keys)}
    return column | {key: column[first] for key, first in tied.items() if first in column}


def combination(values: Tensor, column: int, tau: Tensor) -> Tensor:
    """sum_t values[t, column] tau_t of [T, *shape]."""
    return torch.tensordot(values[:, column], tau, 1)


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


class Coefficients:
    """Learnable (merging.fit): `values` [T, columns], see `columns`.

    clamp: keep them in [0, 1]. A step folds them into one model, and after the backward pass projects the gradient of
    every weight onto its task vectors: beside the model and its gradients one parameter of all experts is in memory.
    """

    def __init__(
        self, experts: Experts, data: Calibration, stream: Stream, init: float, by_parameter: bool, clamp: bool = False
    ):
        self.experts, self.data, self.stream, self.tasks, self.clamp = experts, data, stream, experts.tasks, clamp
        self.column = columns(experts, by_parameter)
        size = len(self.tasks), max(self.column.values(), default=0) + 1
        self.values = torch.full(size, init, device=data.device, requires_grad=True)
        self.module = data.tower().to(data.device)
        self._weights = weights_of(experts, self.module)
        self.module.load_state_dict({key: experts.origin.tensor(key) for key in self.module.state_dict()})
        self._changed = [key for key, tau in stream(None) if tau.any()] or list(self.column)
        self.module.requires_grad_(False)  # of what no expert has changed no coefficient can
        for key in self._weights.keys() & self._changed:
            self._weights[key].requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [self.values]

    def features(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        """[n, D] of the inputs of every task, one task after the other."""
        self._fold()
        return [self.data.features(self.module, some) for some in inputs]

    def _fold(self) -> None:
        """Put W_0 + sum_t lambda_t tau_t into the module."""
        state = self.module.state_dict()
        with torch.no_grad():
            if self.clamp:
                self.values.clamp_(0, 1)
            for key, tau in self.stream(self._changed):
                if key in state:
                    change = combination(self.values, self.column[key], tau.to(self.values.device))
                    state[key].copy_(self.experts.base(key).to(change.device) + change)
        for weight in self._weights.values():
            weight.grad = None

    def after(self) -> None:
        """The gradient of lambda[t, l]: the inner product of that of the weight with tau_t."""
        gradient = torch.zeros_like(self.values)
        for key, tau in self.stream(self._changed):
            weight = self._weights.get(key)
            if weight is not None and weight.grad is not None:
                gradient[:, self.column[key]] += tau.flatten(1).to(gradient.device) @ weight.grad.flatten()
        self.values.grad = gradient
