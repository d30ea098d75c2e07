from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

from torch import Tensor

from merging.context import Context
from merging.experts import Experts
from merging.fit.coefficients import Learning, Shape, columns, combination, learn
from merging.fit.descent import Descent, Losses, descend, seeded, suspicion
from merging.fit.masks import Draw, Lookahead, Masks
from merging.fit.samples import Samples, opened
from merging.merged import Merged
from merging.options import Within


@dataclass(frozen=True)
class Concrete(Learning):
    """Concrete Subspace Learning: a mask over all entries, shared by the experts and learned without labels.

    Tang et al., 2023, arXiv 2312.06173. Task vectors are multiplied by m / mean(m) of every parameter; m is drawn from
    a Concrete distribution whose logits, 0 at the start, lower the entropy of the predictions. coefficients: "fixed" at
    init (Concrete Task Arithmetic); "task" or "layer" (Concrete AdaMerging), where in front of every step of the mask
    the coefficients take a step of Adam from init at rate inner_lr, which is 1 as published: each moves by about 1, so
    that it is no small step; its gradient is taken where the step before had led, as in the authors' code. Then they
    are learned from init under the final mask, by `adapt`. mask: the final one, "relaxed", a last random draw, as
    published; "discrete" of 0 and 1; or "expected", which draws nothing (ours). train, adapt: the descents, published
    Adam at 1e-3, 16 samples a task, 2000 steps of the mask, or 1000 and 1000. split: whose inputs; "test" is the
    authors' transductive setting. In memory are four models, six with learned coefficients.
    """

    coefficients: Literal["fixed", "task", "layer"] = "fixed"
    init: float = 0.3
    temperature: Annotated[float, Within(0.0, 100.0, open_low=True)] = 0.5
    mask: Draw = "relaxed"
    inner_lr: Annotated[float, Within(0.0, 100.0, open_low=True)] = 1.0
    train: Descent = field(default_factory=partial(Descent, lr=1e-3, steps=2000, schedule="constant"))
    adapt: Descent = field(default_factory=partial(Descent, lr=1e-3, steps=1000, schedule="constant"))
    split: Literal["train", "val", "calibration", "test"] = "calibration"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, and where the loss is not finite."""
        experts = replace(experts, separate_qkv=False, cache=None)  # a mask is as large as the model
        shape = Shape.constant(experts, columns(experts, self.coefficients == "layer"), self.init)
        samples = opened(context, self.split, self.needs)
        mask, remarks = self._learned(experts, context, samples, shape)

        def masked(keys: Sequence[str] | None) -> Iterator[tuple[str, Tensor]]:
            yield from ((key, mask[key] * tau if key in mask else tau) for key, tau in experts.stream(keys))

        if self.coefficients == "fixed":
            return experts.merged({key: tau.sum(0) for key, tau in masked(None)}, self.init, remarks=remarks)
        method = replace(self, train=self.adapt)
        values, remarks = learn(method, experts, context, masked, shape, samples)
        changes = {key: combination(values[:, shape.column[key]], tau) for key, tau in masked(None)}
        return experts.merged(changes, remarks=remarks)

    def _learned(
        self, experts: Experts, context: Context, samples: Samples, shape: Shape
    ) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
        """The final mask by parameter, and what is to be said of how it was learned."""
        with seeded(context.seed):  # modules start at random weights
            model = Masks(experts, samples.data, shape, self.temperature, context.seed)
            if self.coefficients != "fixed":
                losses = Losses(self.train, samples, experts, f"{context.seed} inner")
                model.inner = Lookahead(model, losses, self.inner_lr)
                context = replace(context, unfinished=None)  # no state has the moments of the inner steps
        collapsed = descend(model, context, experts, self.train, self.split, "concrete", samples)
        return model.drawn(self.mask), suspicion(collapsed)
