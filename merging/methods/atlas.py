from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

from torch import Tensor

from merging.context import Context
from merging.errors import UserError
from merging.experts import Experts
from merging.fit.coefficients import Learning, Shape, columns, combination, learn
from merging.fit.descent import Descent
from merging.fit.objectives import CrossEntropy, PseudoLabels
from merging.fit.samples import Samples, opened, trusted
from merging.merged import Merged
from merging.options import Count, Within


@dataclass(frozen=True)
class Atlas(Learning, prefix="atlas: "):
    """aTLAS: a coefficient for every expert and parameter, learned from zero on by labels, by few, or by pseudo-labels.

    Zhang et al., 2024, arXiv 2407.02880. init: of all coefficients; at 0 the descent starts at the base. shots:
    labelled samples of each class (atlas_few_shot; published with 1 to 16), null for all. penalty, norm: times the mean
    over parameters of the norm of the coefficients of all experts, published with 0.5 where one is used. train: the
    authors' AdamW at 1e-3, 20 epochs of 128 samples of all tasks together, gradients clipped; 0.1 and 10 epochs for few
    shots; 0.01 for test time. With the objective PseudoLabels (atlas_test_time) no label is opened: the base's most
    certain predictions are trusted, at most a tenth of what a class would have and at most 100. Ours: few shots and
    test time are published for a single task, whose own task vector is left out, here they sum over all tasks;
    pseudo-labels are the classes predicted for the same view of an input, not of another augmentation; the last step is
    kept, not the best epoch on validation. Left out: partitions of a parameter (aTLAS x K) and linearised models.
    """

    init: float = 0.0
    shots: Count | None = None
    penalty: Annotated[float, Within(0.0, 1e6)] = 0.0
    norm: Literal[1, 2] = 1
    train: Descent = field(default_factory=partial(
        Descent, (CrossEntropy(),), 500, 16, 1e-3, "constant", 0.1, "adamw", 1.0))  # fmt: skip
    split: Literal["train", "val", "calibration", "test"] = "calibration"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._pseudo and self.needs == "labels":
            raise UserError(
                "atlas: train.objectives has pseudo_labels beside an objective that compares with labels: the base's "
                "predictions would take their place. Give one of the two a weight of 0."
            )

    @property
    def _pseudo(self) -> bool:
        return any(isinstance(term, PseudoLabels) for term in self.train.terms)

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs or labels, and where the loss is not finite."""
        experts = replace(experts, separate_qkv=False)  # a coefficient for every parameter as the model has it
        column = columns(experts)
        shape = Shape.constant(experts, column, self.init, penalty=self._penalty if self.penalty else None)
        samples = opened(context, self.split, self.needs).few(self.shots)
        if self._pseudo:
            samples = Samples(samples.data, trusted(samples.data, experts))
        values, remarks = learn(self, experts, context, experts.stream, shape, samples)
        changes = experts.map(lambda key, tau: combination(values[:, column[key]], tau))
        return experts.merged(changes, remarks=remarks)

    def _penalty(self, values: Tensor) -> Tensor:
        return self.penalty * values.norm(self.norm, 0).mean()
