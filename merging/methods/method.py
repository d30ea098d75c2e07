"""What a merge method is."""

from typing import ClassVar, Protocol

from merging.experts import Experts
from merging.merged import Merged


class Method(Protocol):
    """Knobs as fields; `needs` says what is used besides weights: nothing | inputs | labels."""

    needs: ClassVar[str]

    def __call__(self, experts: Experts) -> Merged: ...
