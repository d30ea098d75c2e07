from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from merging.calibration import Calibration
from merging.context import Context
from merging.experts import Experts
from merging.fit.folded import weights_of
from merging.merged import Merged
from merging.options import Count, Options, Within
from merging.regression import expert_model
from merging.threads import in_order

FLOOR = 1e-6  # of a weight of the mean, so that what no output depends on is averaged


@dataclass(frozen=True)
class Fisher(Options):
    """Fisher merging: the mean of the experts, every entry weighed by how much an expert's predictions depend on it.

    Matena and Raffel, 2022, arXiv 2111.09832. Of every entry tau = sum_t w_t F_t tau_t / sum_t w_t F_t with F_t the
    diagonal of expert t's Fisher information on its own inputs, labels drawn from its own predictions. labels:
    "expected", sum_c p_c (d log p_c)^2 per sample, the definition, a backward pass for every sample and class;
    "summed", the square of the gradient of sum sqrt(p_c) log p_c over a batch and all classes, as in the code of
    MergeLM and FusionBench, where the numbers that others report come from; it depends on `batch`, 32 theirs.
    normalise: w_t is the inverse of |F_t|, so that no expert outweighs another, as theirs; else 1. samples: per task. A
    head of one output is taken as the mean of a Gaussian of deviation 1 (their code uses labels there). In memory are
    five models, and gradients of one for every core, whatever T.
    """

    labels: Literal["summed", "expected"] = "summed"
    samples: Count = 256
    batch: Count = 32
    normalise: bool = True
    floor: Annotated[float, Within(0.0, 1.0, open_low=True)] = FLOOR
    needs: ClassVar[str] = "inputs"

    def __call__(self, experts: Experts, context: Context) -> Merged:
        """Raises UserError without inputs, and for a model with parameters that base and experts lack."""
        data, experts = context.unlabelled(), replace(experts, separate_qkv=False)  # by the model's own names
        weights_of(experts, data.tower())
        total = {key: torch.zeros(spec.shape) for key, spec in experts.specs().items()}
        moved = {key: torch.zeros(spec.shape) for key, spec in experts.specs().items()}
        for task in range(len(experts.tasks)):
            fisher = self.information(experts, data, task)
            norm = sum(float(values.double().square().sum()) for values in fisher.values()) ** 0.5
            weight = 1 / (norm + self.floor) if self.normalise else 1.0
            for key in total:
                share = weight * (fisher.get(key, torch.zeros(())) + self.floor)
                total[key] += share
                moved[key] += share * experts.task_vector(key, task)
        return experts.merged({key: moved[key] / total[key] for key in total})

    def information(self, experts: Experts, data: Calibration, task: int) -> dict[str, Tensor]:
        """F_t of the model's parameters, the mean over samples, fp32."""
        model = expert_model(experts, data, task).requires_grad_(True)
        leaves = list(model.parameters())
        sums = [torch.zeros_like(leaf) for leaf in leaves]
        batches = data.batches(task, self.samples, 1 if self.labels == "expected" else self.batch)
        run = in_order if data.device.type == "cpu" else map  # on one thread each: the same numbers on any machine
        for squares in run(partial(self._squares, data, task, model, leaves), batches):
            for total, square in zip(sums, squares, strict=True):
                total += square
        count = min(self.samples, data.sizes[task])
        values = {id(leaf): (total / count).cpu() for leaf, total in zip(leaves, sums, strict=True)}
        return {name: values[id(leaf)] for name, leaf in model.named_parameters(remove_duplicate=False)}

    def _squares(
        self, data: Calibration, task: int, model: nn.Module, leaves: Sequence[Tensor], inputs: Any
    ) -> list[Tensor | float]:
        """Of one batch the squares of the gradients."""
        with torch.enable_grad():
            logits = data.outputs(task, data.features(model, inputs)).float().flatten(0, -2)
            terms = list(self._terms(logits))
        sums: list[Tensor | float] = [0.0] * len(leaves)
        for term in terms:
            gradients = torch.autograd.grad(term, leaves, retain_graph=True, allow_unused=True)
            sums = [total if new is None else total + new.square() for total, new in zip(sums, gradients, strict=True)]
        return sums

    def _terms(self, logits: Tensor) -> Iterator[Tensor]:
        """What is differentiated and squared, of logits [rows, C]."""
        if logits.shape[1] == 1:
            scores = logits
        else:
            logs = logits.log_softmax(1)
            scores = logs.exp().sqrt().detach() * logs
        if self.labels == "summed":
            yield scores.sum()
        else:
            yield from scores.flatten()
