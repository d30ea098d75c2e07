from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from merging.context import Context, needs_of
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.black_box import Axis, Evolution, Point, Validation, mean
from merging.fit.surrogate import undominated
from merging.merged import Merged
from merging.methods.average import Average
from merging.methods.method import Method, static
from merging.methods.quantised import quantisable
from merging.options import Share
from merging.packed import Grid
from merging.recombined import FAMILIES, Library

GOALS: Mapping[str, Literal["maximize", "minimize"]] = {"score": "maximize", "storage": "minimize"}


@dataclass(frozen=True)
class Recombination(Grid, prefix="recombination: "):
    """MERGE: attention and FFN of every block merged in groups of tasks that a search finds; an input picks its groups.

    After arXiv 2602.06552 (2026), known by its abstract and second-hand. A module is the attention or the FFN of a
    block for a group of tasks, merged by `then`, for one task its expert's; a router weighs the tasks, and a group
    takes their sum. The search is for a high mean validation score and few modules; its front is kept with a saved
    merge and drawn. storage: the share of all experts' modules that may be kept; the best of those scored merges is
    taken (one group for all, 1 / T, always may be). Ours: NSGA-II with its 300 scored merges and population of 20,
    where the paper lets it search on a random forest; it starts from both families merged, both apart, and one of
    them apart. then: the paper has averaging (ours), Task Arithmetic, TIES and "BC"; it merges all other parameters
    too. coded: modules in `bits`, of groups of inputs; what is coded is the change of the base, whose range is
    small (ours: how the paper shrinks the range of the values is not known). One group for all is folded into the
    weights as it is. Their router is a classifier of three layers; here any will do, and router.gate.top_k=1 is as
    strict as theirs.
    """

    storage: Share = 0.5
    search: Evolution = field(default_factory=Evolution)
    then: Method = field(default_factory=Average)
    coded: bool = True
    bits: Literal[4, 8] = field(default=8, kw_only=True)
    needs: ClassVar[str] = "labels"
    splits: ClassVar[tuple[str, ...]] = ("val",)
    routed: ClassVar[bool] = True

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without validation scores or Optuna, for unknown names, for a layer narrower than a group,
        and where `then` is not static or looks at data."""
        if needs_of(self.then) != "nothing":
            raise UserError(
                f"recombination: then merges a few tasks at a time, and {type(self.then).__name__} looks at data of "
                f"all. Choose a method that needs weights alone."
            )
        merge = lambda some: static(self.then, some, context, "recombination: then")  # noqa: E731
        coded = frozenset(quantisable(self, experts)) if self.coded else frozenset[str]()
        library, most = Library(experts, merge, self, coded), max(self.storage, 1 / len(experts.tasks))
        validation = Validation(lambda point: library.merged(library.groups(point)), self, context)

        def values(point: Point) -> tuple[float, float]:
            groups = library.groups(point)
            return mean(validation(library.point(groups))), library.storage(groups)

        starts = [library.point(library.start(apart)) for apart in ((), FAMILIES, FAMILIES[:1], FAMILIES[1:])]
        axes = {name: Axis(0.0, len(experts.tasks), 0.5) for name in starts[0]}
        tried = self.search.tried(values, GOALS, axes, starts, context)
        rows = undominated(np.array([[score, -storage] for _, (score, storage) in tried]))
        front = []
        for point, (_, storage) in sorted((tried[row] for row in rows), key=lambda trial: trial.values[1]):
            groups = library.groups(point)
            scores = {task: round(score, 6) for task, score in sorted(validation(library.point(groups)).items())}
            front.append({"storage": round(storage, 6), "scores": scores, "groups": groups})
        allowed = [trial for trial in tried if trial.values[1] <= most]
        best = max(allowed, key=lambda trial: (trial.values[0], -trial.values[1]))
        remark = (
            f"mean validation score {tried[0].values[0]:.4f} of all modules merged, {best.values[0]:.4f} with "
            f"{100 * best.values[1]:.0f} % of those of the experts; the front has {len(front)} points"
        )
        remarks, provenance = (*library.rest.remarks, remark), {"front": front}
        return replace(library.merged(library.groups(best.point)), remarks=remarks, provenance=provenance)
