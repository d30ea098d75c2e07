"""What belongs to a task: is not merged, and answers with the numbers of the task's own expert when it is scored."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from merging.checkpoints import Checkpoint
from merging.errors import UserError

HEADS, BIASES = "heads", "heads+biases"


class Owned:
    """The part of Experts that says what belongs to tasks."""

    tasks: tuple[str, ...]
    left_out: tuple[Checkpoint, ...]
    owned: str

    def __post_init__(self) -> None:
        if self.owned not in (HEADS, BIASES):
            raise UserError(f"owned={self.owned} is unknown. Choose {HEADS} or {BIASES}: what is a task's own.")

    @property
    def heads(self) -> dict[str, dict[str, Tensor]]:
        """Task -> the parameters of its expert's head, for those that have one."""
        named = zip(self.tasks, self.left_out, strict=False)
        return {task: {key: head.tensor(key).clone() for key in head.specs()} for task, head in named if head.specs()}

    def is_owned(self, key: str) -> bool:
        """Whether a parameter beside the head belongs to tasks."""
        return self.owned == BIASES and key.endswith("bias")

    @cached_property
    def kept(self) -> dict[str, dict[str, Tensor]]:
        """Task -> changes of the parameters that belong to it, beside its head."""
        if self.owned == HEADS:
            return {}
        whole: Any = replace(self, only=None, sparsifiers=(), owned=HEADS)  # type: ignore[type-var]
        keys = [key for key in whole.specs() if self.is_owned(key)]
        return {task: {key: whole.task_vector(key, index) for key in keys} for index, task in enumerate(self.tasks)}


def check_shared(owned: str | Mapping[str, object]) -> None:
    """Raises UserError where tasks have more than heads of their own: that is no model to be saved."""
    if owned and owned != HEADS:
        raise UserError(
            f"With owned={BIASES} every task answers with biases of its own: one way to score a merge, and no model "
            f"that could be saved. Save with owned={HEADS}."
        )
