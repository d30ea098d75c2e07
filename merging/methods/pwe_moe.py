from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from merging.context import Context
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.coefficients import Learning, Shape, combination, learn
from merging.fit.descent import Descent
from merging.fit.objectives import CrossEntropy
from merging.fit.preferences import Nets, Preferred, at, equal
from merging.fit.samples import opened
from merging.merged import Merged
from merging.options import Coefficient
from merging.preflight import some


@dataclass(frozen=True)
class PweMoe(Learning):
    """PWE-MoE: one model for every preference among the tasks, by small nets from preferences to coefficients.

    Tang et al., 2024, arXiv 2406.09770, by the code in fusion_bench, which calls it untested; no published numbers are
    known. Every FFN, and with families "ffn+attention" every attention, has a net from the preference, T shares of sum
    1, to the coefficients of its task vectors; all else is Task Arithmetic at init. In training a preference is drawn
    for every step, uniformly, and the losses of the tasks are summed by their shares (LS; the variant by exact Pareto
    points, whose code cannot run, is left out). preference: task -> share of the merge that is made, those not named 0,
    null is equal; the nets are learned once for all. depth: of the nets, published 2, with a hidden layer. train, by 16
    labelled samples a task: published Adam at 1e-2 for 2000 steps with FFNs alone, at 1e-5 for 8000 with attention, by
    a cosine to a tenth (here to zero).
    """

    families: Literal["ffn", "ffn+attention"] = "ffn"
    depth: Literal[1, 2] = 2
    init: Coefficient = 0.3
    preference: Mapping[str, float] | None = None
    train: Descent = field(default_factory=partial(Descent, objectives=(CrossEntropy(),), lr=1e-2, steps=2000))
    split: Literal["train", "val", "calibration", "test"] = "calibration"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without samples, for names that no table has, and for a preference of other tasks."""
        experts, preference = replace(experts, separate_qkv=False), self._preference(experts)
        samples = opened(context, self.split, self.needs)
        column, count = self._columns(experts)
        nets = Nets(experts.tasks, count, self.depth)
        shape = Shape(column, nets.start(self.init, context.seed))
        kind = partial(Preferred, nets=nets, fixed=self.init, seed=context.seed)
        method = replace(self, preference=None)  # which is no matter of learning
        free, remarks = learn(method, experts, context, experts.stream, shape, samples, kind)
        values = at(nets, free, self.init, preference)
        changes = {key: combination(values[:, column[key]], tau) for key, tau in experts.stream()}
        return experts.merged(changes, remarks=remarks)

    def _columns(self, experts: Experts) -> tuple[dict[str, slice], int]:
        """The column of every parameter, the first of what no net decides, and how many nets there are."""
        families = self.families.split("+")
        infos = {key: experts.param(key) for key in experts.specs()}
        modules = {key: (info.block, info.family) for key, info in infos.items()
                   if info.block is not None and info.family in families}  # fmt: skip
        numbers = {module: index for index, module in enumerate(dict.fromkeys(modules.values()), 1)}
        places = {key: numbers[modules[key]] if key in modules else 0 for key in infos}
        return {key: slice(place, place + 1) for key, place in places.items()}, len(numbers)

    def _preference(self, experts: Experts) -> Tensor:
        """Shares [T] of sum 1."""
        if self.preference is None:
            return equal(experts.tasks)
        shares = torch.tensor([float(self.preference.get(task, 0.0)) for task in experts.tasks])
        if unknown := sorted({*self.preference} - {*experts.tasks}):
            raise UserError(f"pwe_moe: preference names {some(unknown)}, and the tasks are {', '.join(experts.tasks)}.")
        if not (shares.isfinite().all() and (shares >= 0).all() and shares.any()):
            raise UserError("pwe_moe: preference needs shares of 0 or more, one of them above 0.")
        return shares / shares.sum()
