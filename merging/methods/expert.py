from dataclasses import dataclass
from typing import ClassVar

from merging.deltas import Delta
from merging.experts import Experts
from merging.merged import Merged, Routing


@dataclass(frozen=True)
class Expert:
    """Each task by its own expert, chosen by the true task id: the reference that normalised accuracy divides by."""

    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        keys = experts.keys()
        deltas: dict[str, Delta] = {key: experts.delta(key) for key in keys}
        return experts.merged({}, deltas=deltas, routing=Routing("oracle"))
