"""What a merge method is."""

from collections.abc import Callable
from inspect import signature
from typing import Any, ClassVar, Protocol

import torch

from merging.context import ALONE, Context, nested
from merging.errors import UserError
from merging.experts import Experts, Sparsifier
from merging.merged import Merged
from merging.options import snake_case


class Method(Protocol):
    """Hyperparameters as fields; `needs` says what is used besides weights: nothing | inputs | labels.

    A method that opens another split than calibration lists them as `splits`; one that makes an adapter of adapters, by
    adding task vectors or as products of its own, says `additive = True`, and one that keeps no changes of a large
    model in memory says `streams = True`, with those inside it. One that merges not any number of experts says how
    many, as a range: `takes`.
    """

    needs: ClassVar[str]
    __call__: Callable[..., Merged]  # of Experts, and of a Context where it uses one


def static(method: Method, experts: Experts, context: Context, role: str) -> Merged:
    """What `method` makes of experts.

    Raises UserError, naming the role, if that is not one model, or was quantised already.
    """
    merged = call(method, experts, context)
    if not merged.is_static:
        raise UserError(f"{role} must be a static method, one model for all inputs; {type(method).__name__} is not.")
    if merged.packed:
        raise UserError(f"{role} was quantised by {type(method).__name__}, which comes last: put it behind the others.")
    return merged


def call(method: Callable[..., Merged], experts: Experts, context: Context = ALONE) -> Merged:
    """`method(experts, context)`, or `method(experts)` where it takes one argument.

    Raises UserError for more or fewer experts than it takes, and where no Merged comes back.
    """
    check_count(method, len(experts.tasks))
    kinds = [parameter.kind.name for parameter in signature(method).parameters.values()]
    several = "VAR_POSITIONAL" in kinds or sum(kind.startswith("POSITIONAL") for kind in kinds) > 1
    with torch.inference_mode(False):  # a result is used outside of it too, and threads are not in it
        merged = method(experts, context) if several else method(experts)
    if not isinstance(merged, Merged):
        raise UserError(
            f"The method returned a {type(merged).__name__}. A method is a function of Experts that returns "
            f"experts.merged(...)."
        )
    return merged


def check_count(method: Any, count: int) -> None:
    """Raises UserError where a method, or one inside it, cannot merge that many experts."""
    for part in nested(method):
        takes = getattr(part, "takes", None)
        if takes is not None and count not in takes:
            most = takes.start if len(takes) == 1 else f"{takes.start} or more"
            raise UserError(
                f"{snake_case(type(part).__name__)} merges {most} experts, and here are {count}. Give as many, or "
                f"choose a method that takes any number, such as average or karcher."
            )


class InFront:
    """Mixin of the methods that put a sparsifier in front of another method, `then`, which merges what it leaves."""

    then: Method

    def sparsifier(self, experts: Experts) -> Sparsifier:
        """What every task vector passes."""
        raise NotImplementedError

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        return call(self.then, experts.sparsified(self.sparsifier(experts)), context)
