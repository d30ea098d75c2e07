"""A model whose weights are changed by something free, folded for every step: what all learning of weights shares."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from merging.calibration import Calibration
from merging.errors import UserError
from merging.experts import Experts
from merging.preflight import some

# (key, tau [T, *shape]) of some keys, or all, in a fixed order; a buffer used again
Stream = Callable[[Sequence[str] | None], Iterator[tuple[str, Tensor]]]


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


class Folded:
    """Learnable (merging.fit), without what is free: W_0 + `change` of every parameter.

    A step folds them into one model, and after the backward pass hands the gradient of every weight to `pull`: beside
    the model and its gradients one parameter of all experts is in memory.
    """

    def __init__(self, experts: Experts, data: Calibration, stream: Stream):
        self.experts, self.data, self.stream, self.tasks = experts, data, stream, experts.tasks
        self.tied: Mapping[str, str] = experts.tied
        self.module = data.tower().to(data.device)
        self._weights = weights_of(experts, self.module)
        self.module.load_state_dict({key: experts.origin.tensor(key) for key in self.module.state_dict()})
        self.changed = [key for key, tau in stream(None) if tau.any()] or list(experts.specs())
        self.module.requires_grad_(False)  # what no expert has changed nothing can be learned of
        for key in self._weights.keys() & self.changed:
            self._weights[key].requires_grad_()

    def first(self, key: str) -> str:
        """The name under which what is free of a parameter is kept: of tied ones the first."""
        return self.tied.get(key, key)

    def change(self, key: str, tau: Tensor) -> Tensor:
        """What is added to a parameter [*shape], of its task vectors [T, *shape]; called without autograd."""
        raise NotImplementedError

    def pull(self, key: str, tau: Tensor, gradient: Tensor) -> None:
        """Take in the gradient of a weight [*shape], that of its change."""
        raise NotImplementedError

    def features(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        """[n, D] of the inputs of every task, one task after the other."""
        self.fold()
        return [self.data.features(self.module, some) for some in inputs]

    @torch.no_grad()
    def fold(self) -> None:
        """Put the changed weights into the module; their gradients are forgotten."""
        state = self.module.state_dict()
        for key, tau in self.stream(self.changed):
            if key in state:
                change = self.change(key, tau.to(self.data.device))
                state[key].copy_(self.experts.base(key).to(change.device) + change)
        for weight in self._weights.values():
            weight.grad = None

    def gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of every weight its name, its task vectors [T, *shape] and its gradient [*shape]; of tied ones once."""
        gone = set[int]()
        for key, tau in self.stream(self.changed):
            weight = self._weights.get(key)
            if weight is not None and weight.grad is not None and id(weight) not in gone:
                gone.add(id(weight))
                yield key, tau.to(self.data.device), weight.grad

    def after(self) -> None:
        for key, tau, gradient in self.gradients():
            self.pull(key, tau, gradient)
