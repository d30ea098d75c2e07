from dataclasses import dataclass
from typing import ClassVar

from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged


@dataclass(frozen=True)
class Single:
    """The expert of one task for all tasks.

    As the shared expert of Twin-Merging it is the ablation "dynamic merging" of that paper's Table 6. task: a name, or
    a position in the list of tasks; None takes the first name in the alphabet, whatever the order of the list.
    """

    task: str | int | None = None
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts: Experts) -> Merged:
        task = self._position(experts.tasks)
        return experts.merged({key: experts.task_vector(key, task) for key in experts.specs()})

    def _position(self, tasks: tuple[str, ...]) -> int:
        chosen = min(tasks) if self.task is None else self.task
        if chosen in tasks:
            return tasks.index(str(chosen))
        if isinstance(chosen, int) and 0 <= chosen < len(tasks):
            return chosen
        raise UserError(
            f"single: task={chosen!r} is none of the tasks {', '.join(tasks)}, and no position from 0 to "
            f"{len(tasks) - 1}."
        )
