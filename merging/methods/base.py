from dataclasses import dataclass
from typing import ClassVar

from merging.experts import Experts
from merging.merged import Merged


@dataclass(frozen=True)
class Base:
    """The pretrained model as it is: what every method starts from (zero-shot accuracy)."""

    needs: ClassVar[str] = "nothing"
    streams: ClassVar[bool] = True

    def __call__(self, experts: Experts) -> Merged:
        return experts.merged({})


@dataclass(frozen=True)
class LinearProbe(Base):
    """The pretrained model under linear heads fitted on its own features: what labels are worth without any expert."""

    needs: ClassVar[str] = "labels"  # of train, for the heads
