"""Matrices by regression on what goes into them: normal equations, added up task by task, and where they are asked."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from merging.applied import as_applied
from merging.calibration import Calibration
from merging.experts import Experts
from merging.interference import Quadratic
from merging.merged import Merged
from merging.statistics import grams

Normaliser = Literal["none", "frobenius", "trace"]
Measure = Callable[[int, Sequence[str]], tuple[dict[str, Tensor], dict[str, int]]]  # see statistics.gram_sums
ZERO = torch.zeros((), dtype=torch.float64)
TINY = torch.finfo(torch.float64).tiny
SIZES: Mapping[str, Callable[[Tensor], Tensor | float]] = {  # what a task's Gram matrix [n, n] is divided by
    "none": lambda gram: 1.0,
    "frobenius": lambda gram: gram.norm().clamp_min(TINY),
    "trace": lambda gram: gram.trace().clamp_min(TINY),
}


class Equations(NamedTuple):
    """sum_t (x G_t - Y_t) = 0 in x [m, n], fp64; of the gain of a norm feature by feature, G_t its diagonal [n]."""

    gram: Tensor = ZERO  # sum_t G_t
    moved: Tensor = ZERO  # sum_t Y_t

    def plus(self, gram: Tensor, moved: Tensor, size: Tensor | float = 1.0) -> "Equations":
        """With those of another task, divided by `size`."""
        return Equations(self.gram + gram / size, self.moved + moved / size)

    def around(self, anchor: Tensor) -> Quadratic:
        """The loss whose minimum solves them, around an anchor [m, n]."""
        return Quadratic(anchor, self.gram, anchor @ self.gram - self.moved)


def of_experts(experts: Experts, data: Calibration, samples: int) -> Measure:
    """What goes into matrices in each expert itself, on the first `samples` inputs of its task."""
    return lambda task, keys: grams(data, experts.checkpoints[task], task, keys, samples)


def equations(
    experts: Experts,
    keys: Sequence[str],
    measure: Measure,
    weigh: Callable[[Tensor, int], Tensor] = lambda gram, rows: gram / rows,
    normaliser: Normaliser = "none",
) -> dict[str, Equations]:
    """Those of the task vectors, sum_t (x - tau_t) G_t = 0, of every matrix as it is applied; one task at a time.

    weigh: G_t of the sum of its rows and their number.
    """
    total = {key: Equations() for key in keys}
    for task in range(len(experts.tasks)) if keys else ():
        sums, rows = measure(task, keys)
        for key in keys:
            gram = weigh(sums.pop(key), rows[key])
            tau = as_applied(experts, key, experts.task_vector(key, task)).double()
            moved = tau @ gram if gram.ndim == 2 else tau * gram
            total[key] = total[key].plus(gram, moved, SIZES[normaliser](gram))
    return total


def matrices(experts: Experts, kinds: Sequence[str], keys: Iterable[str] | None = None) -> list[str]:
    """Those parameters of these kinds that are matrices, and share their tensor with no other."""
    specs, tied = experts.specs(), shared(experts)
    keys = [key for key in (specs if keys is None else keys) if len(specs[key].shape) == 2 and key not in tied]
    return [key for key in keys if any(experts.param(key).is_a(kind) for kind in kinds)]


def shared(experts: Experts) -> set[str]:
    """All names of parameters that have several."""
    return {*experts.tied, *experts.tied.values()}


def by_block(experts: Experts, keys: Iterable[str]) -> list[list[str]]:
    """Parameters of one block, or of none, together."""
    blocks: dict[str | None, list[str]] = {}
    for key in keys:
        blocks.setdefault(experts.param(key).block, []).append(key)
    return list(blocks.values())


def stages(experts: Experts, data: Calibration) -> list[list[str]]:
    """The parameters of each block in the order of a forward, an encoder's first; last those behind all blocks.

    Without those that share their tensor with another.
    """
    tied, infos = shared(experts), {key: experts.param(key) for key in experts.specs()}
    names = [name for name, _ in data.tower().named_parameters() if name in infos and name not in tied]
    inside = [name for name in names if infos[name].block is not None]
    outside = [name for name in names if infos[name].block is None]
    behind = [name for name in outside if infos[name].after or infos[name].kind == "projection"]
    return [stage for stage in (*by_block(experts, inside), behind) if stage]


def mean(experts: Experts, key: str) -> Tensor:
    """The mean task vector of a matrix as it is applied, fp64."""
    taus = (experts.task_vector(key, task) for task in range(len(experts.tasks)))
    return sum((as_applied(experts, key, tau).double() / len(experts.tasks) for tau in taus), ZERO)


def change_of(merged: Merged, key: str) -> Tensor:
    """What a static merge adds to one parameter, fp32."""
    return merged.unrounded(key) - merged.base.tensor(key).float()


def expert_weight(experts: Experts, key: str, task: int) -> Tensor:
    """One parameter of an expert in fp32, with what sparsifiers leave of its task vector."""
    if experts.sparsifiers:
        return experts.base(key) + experts.task_vector(key, task)
    return experts.checkpoints[task].tensor(key).float()


def put(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write parameters into a module, which must be nobody else's."""
    state = module.state_dict()
    for key, weight in weights.items():
        if key in state:
            state[key].copy_(weight)


def expert_weights(experts: Experts, task: int, chosen: Callable[[str], bool]) -> dict[str, Tensor]:
    """Those of an expert whose names are chosen, counters too, with what sparsifiers leave of its task vectors."""
    merged = experts.specs() if experts.sparsifiers else {}
    checkpoint = experts.checkpoints[task]
    return {
        key: expert_weight(experts, key, task) if key in merged else checkpoint.tensor(key).float()
        for key in checkpoint.specs()
        if chosen(key)
    }


def expert_model(experts: Experts, data: Calibration, task: int) -> nn.Module:
    """The backbone with an expert's weights, with what sparsifiers leave of its task vectors."""
    model = data.model(experts.checkpoints[task])
    if experts.sparsifiers:
        put(model, {key: expert_weight(experts, key, task) for key in experts.specs()})
    return model
