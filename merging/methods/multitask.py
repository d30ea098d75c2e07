from dataclasses import dataclass, replace
from typing import ClassVar

from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged


@dataclass(frozen=True)
class Multitask:
    """One model fine-tuned on the labelled images of all tasks together: a reference, what merging does without."""

    needs: ClassVar[str] = "labels"

    def __call__(self, experts: Experts) -> Merged:
        """Raises UserError where whoever opened the experts has no such model."""
        if experts.multitask is None:
            raise UserError(
                "multitask is no merge: it is a model trained on the data of all tasks, and these experts come without "
                "one. Open them with it, or choose a method that merges."
            )
        alone = replace(experts, checkpoints=(experts.multitask(),), tasks=("all tasks",), cache=None)
        return experts.merged({key: alone.task_vector(key, 0) for key in experts.specs()})
