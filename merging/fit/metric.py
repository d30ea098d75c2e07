"""A metric of low rank under which the nearest samples are of the same task."""

import torch
from torch import Tensor

from merging.fit.descent import cosine

STEPS, RATE = 100, 0.1  # of Adam; the rate in units of the start's mean entry


@torch.enable_grad()
def learned_metric(samples: Tensor, tasks: Tensor, rank: int) -> Tensor:
    """L [rank, F] that lowers the mean of -log p_i over samples [n, F] of tasks [n].

    p_i is how often sample i meets its own task if it chooses a neighbour j by softmax_j -|L x_i - L x_j|^2, which is
    neighbourhood components analysis (Goldberger et al., 2004); samples without another one of their task are left out.
    L starts at the leading principal directions of standardised samples, at a mean squared distance of 1.
    """
    spread = samples.std(0, correction=0).clamp_min(1e-6)
    samples = (samples - samples.mean(0)) / spread
    metric = principal(samples, rank).requires_grad_()
    optimizer = torch.optim.Adam([metric])
    unit = float(metric.detach().abs().mean())
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = cosine(RATE * unit, step, STEPS)
        optimizer.zero_grad(set_to_none=True)
        missed(samples @ metric.T, tasks).backward()
        optimizer.step()
    return metric.detach() / spread


def principal(samples: Tensor, rank: int) -> Tensor:
    """The leading directions [rank, F] of centred samples [n, F], such that their mean squared distance is 1."""
    directions = torch.linalg.svd(samples, full_matrices=len(samples) < rank)[2][:rank]
    return directions / (2 * (samples @ directions.T).square().sum(1).mean()).sqrt().clamp_min(1e-12)


def missed(points: Tensor, tasks: Tensor) -> Tensor:
    """Mean of -log p_i over points [n, r] that have another one of their task, see `learned_metric`."""
    alone = torch.eye(len(points), dtype=torch.bool, device=points.device)
    lengths = points.square().sum(1)
    logs = (2 * points @ points.T - lengths - lengths[:, None]).masked_fill(alone, -torch.inf).log_softmax(1)
    own = (tasks[:, None] == tasks) & ~alone
    chances = logs.masked_fill(~own, -torch.inf)[own.any(1)].logsumexp(1)
    return -chances.sum() / max(len(chances), 1)
