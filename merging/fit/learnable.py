"""What a descent needs to know of what it trains."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Learnable(Protocol):
    """A merged model some of whose numbers are free."""

    tasks: tuple[str, ...]

    def parameters(self) -> list[Tensor]:
        """The free numbers, leaves with gradients."""
        ...

    def before(self) -> None:
        """Called before the forward pass of a step: put the free numbers into the model."""
        ...

    def features(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        """What the heads read, [n, D] per task, of a batch of inputs of every task."""
        ...

    def after(self) -> None:
        """Called after the backward pass of a step: gather the gradients of the free numbers."""
        ...
