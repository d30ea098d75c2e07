from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from merging.context import Context
from merging.experts import Experts
from merging.fit.coefficients import Learning, Shape, columns, combination, learn
from merging.fit.descent import Descent
from merging.fit.samples import opened
from merging.merged import Merged
from merging.methods.ties import agreeing
from merging.options import Fraction


@dataclass(frozen=True)
class AdaMerging(Learning, prefix="ada_merging: "):
    """Task arithmetic whose coefficients are learned by lowering the entropy of the predictions, without labels.

    Yang et al., 2024, arXiv 2310.02575. level: "task", one coefficient per expert; "layer", one per expert and
    parameter. init: of all coefficients. density: below 1 the task vectors are first trimmed to that share and to the
    elected signs, as in TIES (AdaMerging++). clamp: keep coefficients in [0, 1], as the authors' code does. train: the
    descent; the authors' Adam at 1e-3 and batches of 16. split: whose inputs; "test" is the paper's transductive
    setting.
    """

    level: Literal["task", "layer"] = "layer"
    init: float = 0.3
    density: Fraction = 1.0
    clamp: bool = False
    train: Descent = field(default_factory=partial(Descent, lr=1e-3, schedule="constant"))
    split: Literal["train", "val", "calibration", "test"] = "calibration"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, and where the loss is not finite."""
        experts = replace(experts, separate_qkv=False)  # a coefficient for every parameter as the model has it
        trimmed = dict(agreeing(experts, self.density)) if self.density < 1 else None
        stream = experts.stream if trimmed is None else lambda keys: ((key, trimmed[key]) for key in keys or trimmed)
        column = columns(experts, self.level == "layer")
        shape = Shape.constant(experts, column, self.init, clamp=self.clamp)
        samples = opened(context, self.split, self.needs)
        values, remarks = learn(self, experts, context, stream, shape, samples)
        changes = {key: combination(values[:, column[key]], tau) for key, tau in stream(None)}
        return experts.merged(changes, remarks=remarks)
