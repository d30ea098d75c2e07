from dataclasses import dataclass, replace
from typing import ClassVar

from merging.context import ALONE, Context
from merging.experts import Experts
from merging.merged import Merged


@dataclass(frozen=True)
class Multitask:
    """One model fine-tuned on the labelled samples of all tasks together: a reference, what merging does without."""

    needs: ClassVar[str] = "labels"

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        """Raises UserError where the context has no such model."""
        alone = replace(experts, checkpoints=(context.multitask(),), tasks=("all tasks",), cache=None)
        return experts.merged({key: alone.task_vector(key, 0) for key in experts.specs()})
