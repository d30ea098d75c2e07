"""What a merge method is."""

from typing import ClassVar, Protocol

from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged


class Method(Protocol):
    """Knobs as fields; `needs` says what is used besides weights: nothing | inputs | labels."""

    needs: ClassVar[str]

    def __call__(self, experts: Experts) -> Merged: ...


def static(method: Method, experts: Experts, role: str) -> Merged:
    """What `method` makes of experts. Raises UserError, naming the role, if that depends on the input."""
    merged = method(experts)
    if merged.deltas:
        raise UserError(f"{role} must be a static method, one model for all inputs; {type(method).__name__} is not.")
    return merged
