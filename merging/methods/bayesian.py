from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

from torch import Tensor

from merging.applied import as_applied, as_stored
from merging.combined import Changes
from merging.context import ALONE, Context
from merging.experts import Experts
from merging.fit.black_box import Axis, BlackBox, Point, Validation, mean
from merging.interference import Quadratic, Spectrum
from merging.kinds import ByKind
from merging.merged import Merged
from merging.methods.method import Method, static
from merging.methods.reg_mean import KINDS
from merging.methods.task_arithmetic import TaskArithmetic
from merging.options import Count, Within
from merging.preflight import check_range
from merging.regression import Normaliser, by_block, change_of, equations, matrices, of_experts

LIMITS = 1e-9, 1e12
SPREAD = 1000.0  # how far a search goes from the given rho, as a factor


@dataclass(frozen=True)
class Bayesian(ByKind, prefix="bayesian: "):
    """Bayesian Model Merging: every matrix by regression, with another merge as the mean of its prior, in closed form.

    After arXiv 2605.12843 (2026), known by its abstract and digests. Of every matrix W = (sum_t W_t G_t + rho
    W_anchor) (sum_t G_t + rho)^-1, solved as a change of the base. gram: "inputs", G_t of all tokens that go into
    the matrix in expert t; "task_vectors", the data-free variant, G_t = tau_t^T tau_t, with a fused query, key and
    value as one matrix even where methods see three. anchor: the merge of the prior, whose other parameters stay.
    rho: for all kinds of matrices but those that `rhos` names (ffn, attention, projection, or finer). scale, kinds:
    of the change. search: the paper's outer loop, Bayesian optimisation of rho and scale of every family of
    matrices on validation, from those given; null takes them as they are. Its kernel, trials and ranges are
    unknown: Optuna's Parzen estimators, rho up to a thousand times larger or smaller and scales of 0 to 2 are ours.
    normaliser: of each G_t; it and the defaults are ours (FeatCal's), no published values are known, and this is no
    reproduction. samples: per task. by_block: as RegMean's; a search keeps the eigenvectors of all matrices in
    memory.
    """

    rho: Annotated[float, Within(*LIMITS)] = 0.05
    rhos: Mapping[str, float | None] = field(default_factory=lambda: dict.fromkeys(KINDS))
    gram: Literal["inputs", "task_vectors"] = "inputs"
    normaliser: Normaliser = "frobenius"
    samples: Count = 256
    by_block: bool = False
    anchor: Method = field(default_factory=TaskArithmetic)
    scale: float = 1.0
    search: BlackBox | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind, rho in self.rhos.items():
            if rho is not None:
                check_range(f"bayesian: rhos.{kind}", rho, *LIMITS)

    @property
    def needs(self) -> str:  # of inputs none without data
        return "inputs" if self.gram == "inputs" else "nothing"

    @property
    def splits(self) -> tuple[str, ...]:  # a search opens validation beside
        return ("calibration",) if self.gram == "inputs" else ()

    def __call__(self, experts: Experts, context: Context = ALONE) -> Merged:
        """Raises UserError without inputs, for names that no table has, and for an anchor that needs the input."""
        start = static(self.anchor, experts, context, "What is the prior's mean")
        experts = replace(experts, separate_qkv=False)  # the same for inputs, as rows are solved one by one
        changes = {key: change_of(start, key) for key in experts.specs()}
        keys = matrices(experts, KINDS)
        if self.gram == "inputs":
            measure = of_experts(experts, context.unlabelled(), self.samples)
            groups = by_block(experts, keys) if self.by_block else [keys]
        else:
            measure, groups = partial(_task_vectors, experts), [[key] for key in keys]
        solvers: dict[str, Spectrum] = {}
        for group in groups:
            total = equations(experts, group, measure, normaliser=self.normaliser)
            for key in group:
                quadratic = total.pop(key).around(as_applied(experts, key, changes[key]).double())
                if self.search is None:
                    changes[key] = self._solved(experts, key, quadratic)
                else:
                    solvers[key] = quadratic.spectrum()
        if self.search is None:
            merged = self.weighed(experts, changes, self.scale)
        else:
            merged = self._searched(self.search, experts, context, changes, solvers)
        return replace(merged, remarks=(*start.remarks, *merged.remarks))

    def _searched(
        self, search: BlackBox, experts: Experts, context: Context, changes: Changes, solvers: Mapping[str, Spectrum]
    ) -> Merged:
        """The merge at the rho and scale of every family of matrices that validation prefers."""

        def made(point: Point) -> Merged:
            rhos = {**self.rhos, **{kind: point[f"rho.{kind}"] for kind in families}}
            kinds = {**self.kinds, **{kind: point[f"scale.{kind}"] for kind in families}}
            method = replace(self, rhos=rhos, kinds=kinds, search=None)
            solved = {key: method._solved(experts, key, solver) for key, solver in solvers.items()}
            return method.weighed(experts, {**changes, **solved}, self.scale)

        families = sorted({experts.param(key).family for key in solvers})
        axes = {f"scale.{kind}": Axis(0.0, 2.0, 1.0) for kind in families}
        for kind, rho in ((kind, self.rhos.get(kind) or self.rho) for kind in families):
            axes[f"rho.{kind}"] = Axis(rho / SPREAD, rho * SPREAD, rho, True)
        scores = Validation(made, self, context)
        best = search.best(lambda point: mean(scores(point)), axes, context)
        return replace(made(best.point), remarks=(best.remark,))

    def _solved(self, experts: Experts, key: str, solver: Quadratic | Spectrum) -> Tensor:
        """The change of one matrix, as stored, around the anchor's."""
        info = experts.param(key)
        rho = next((rho for kind in (info.kind, info.family) if (rho := self.rhos.get(kind)) is not None), self.rho)
        return as_stored(experts, key, solver.regularised(rho))


def _task_vectors(experts: Experts, task: int, keys: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """tau_t^T tau_t in the place of what goes into matrices."""
    taus = {key: as_applied(experts, key, experts.task_vector(key, task)).double() for key in keys}
    return {key: tau.T @ tau for key, tau in taus.items()}, dict.fromkeys(keys, 1)
