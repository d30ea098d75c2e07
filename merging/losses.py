"""What gates are trained on, none of it needing class labels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from merging.calibration import Calibration
from merging.experts import Experts
from merging.threads import each


def mean_entropy(logits: Tensor) -> Tensor:
    """Mean Shannon entropy (nats) of softmax over [B, C], from log_softmax in fp32."""
    logs = logits.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy (nats) of the mean prediction over [B, C]: log C when all classes are used alike, 0 after collapse."""
    logs = logits.float().log_softmax(-1).logsumexp(0) - math.log(len(logits))
    return -(logs.exp() * logs).sum(-1)


def task_loss(weights: Tensor, tasks: Tensor, count: int, activation: str) -> Tensor:
    """How far weights [B, G] are from one-hot at `tasks` [B]; the parts of a task count together.

    softmax: cross-entropy; sigmoid: binary cross-entropy; real weights: mean squared error, parts averaged.
    """
    parts = weights.unflatten(-1, (count, -1))
    if activation == "softmax":
        return functional.nll_loss(parts.sum(-1).clamp_min(1e-12).log(), tasks)
    wanted = functional.one_hot(tasks, count).to(weights.dtype)
    if activation == "sigmoid":
        return functional.binary_cross_entropy(parts.mean(-1), wanted)
    return functional.mse_loss(parts.mean(-1), wanted)


@torch.inference_mode()
def expert_features(experts: Experts, calibration: Calibration) -> list[Tensor]:
    """Unit features of every expert on the images of its own task, [n, D] each."""

    def one(task: int) -> Tensor:
        tower = calibration.tower()
        tower.load_state_dict({key: experts.checkpoints[task].tensor(key).float() for key in tower.state_dict()})
        tower = tower.to(calibration.device)
        return functional.normalize(torch.cat([tower(images) for images in calibration.batches(task)]), dim=-1)

    return [features.clone() for features in each(one, range(len(experts.tasks)))]


class Watch:
    """The collapse guard: tasks whose predictions fell onto few classes while their entropy went down.

    A task is suspected when the entropy of its mean prediction over the last quarter of the steps lies below half of
    log C, and its mean entropy is lower than over the first quarter.
    """

    def __init__(self, tasks: Sequence[str]):
        self.tasks = tasks
        self._seen: list[list[Tensor]] = [[] for _ in tasks]  # mean predictions [C], then their mean entropy

    def note(self, task: int, logits: Tensor) -> None:
        """One step's logits [B, C] of a task."""
        logits = logits.detach().float()
        self._seen[task].append(torch.cat([logits.softmax(-1).mean(0), mean_entropy(logits)[None]]))

    def collapsed(self) -> list[str]:
        """Names of the suspected tasks."""
        found = []
        for name, seen in zip(self.tasks, self._seen, strict=True):
            quarter = max(len(seen) // 4, 1)
            first, last = (torch.stack(part).mean(0) for part in (seen[:quarter], seen[-quarter:]))
            if last[-1] < first[-1] and torch.special.entr(last[:-1]).sum() < 0.5 * math.log(len(last) - 1):
                found.append(name)
        return found
