from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from merging.cache import code, key_of
from merging.context import Context
from merging.experts import Experts
from merging.fit.coefficients import Coefficients, Stream, columns, combination
from merging.fit.descent import Descent, descend, seeded
from merging.identity import identity
from merging.merged import Merged
from merging.methods.ties import agreeing
from merging.options import Fraction, Options

CODE = ("merging.fit", "merging.methods.ada_merging", "merging.methods.ties", "merging.backbones")


@dataclass(frozen=True)
class AdaMerging(Options):
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

    @property
    def needs(self) -> str:  # labels where an objective compares with them
        return self.train.needs

    @property
    def splits(self) -> tuple[str, ...]:
        return (self.split,)

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, and where the loss is not finite."""
        experts = replace(experts, separate_qkv=False)  # a coefficient for every parameter as the model has it
        trimmed = dict(agreeing(experts, self.density)) if self.density < 1 else None
        stream = experts.stream if trimmed is None else lambda keys: ((key, trimmed[key]) for key in keys or trimmed)
        values, collapsed = self._learned(experts, context, stream)
        column = columns(experts, self.level == "layer")
        changes = {key: combination(values, column[key], tau) for key, tau in stream(None)}
        remarks = (f"suspected of collapse: {', '.join(collapsed)}",) if collapsed else ()
        return experts.merged(changes, remarks=remarks)

    def _learned(self, experts: Experts, context: Context, stream: Stream) -> tuple[Tensor, list[str]]:
        """Coefficients [T, columns] and the tasks suspected of collapse; learned once per content."""
        data = context.unlabelled(self.split)

        def learn() -> dict[str, Tensor]:
            with seeded(context.seed):  # a module starts at random weights
                model = Coefficients(experts, data, stream, self.init, self.level == "layer", self.clamp)
            collapsed = descend(model, context, experts, self.train, self.split, "ada_merging")
            values = model.values.detach().cpu()
            return {
                "values": values.clamp(0, 1) if self.clamp else values,
                "collapsed": torch.tensor([task in collapsed for task in experts.tasks]),
            }

        if experts.cache is None:
            learned = learn()
        else:
            ids = [experts.origin.id, *(checkpoint.id for checkpoint in experts.checkpoints)]
            seen = (data.split, data.ids, data.head_ids, data.backbone, data.device.type, data.precision)
            made_from = (identity(self), ids, sorted(experts.specs()), seen, context.seed)
            learned = experts.cache.tensors(key_of("ada_merging", code(CODE), *made_from), learn)
        names = zip(experts.tasks, learned["collapsed"].tolist(), strict=True)
        return learned["values"], [name for name, suspected in names if suspected]
