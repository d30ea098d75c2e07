"""Published methods that look at entries, written down step by step in fp64; as in published.py, no code is shared.

Each maps task vectors {key: [T, *shape]} to the change of the base {key: [*shape]}.
"""

import torch


def breadcrumbs(tau, density, outliers):
    """One task vector of one parameter: TaskVectorMiddleKeep with `remove_first`."""
    if tau.ndim == 0:
        return tau
    rows = tau.reshape(-1, tau.shape[-1]).tolist()
    for row in rows:
        order = sorted(range(len(row)), key=lambda column: -abs(row[column]))
        for column in order[: int(len(row) * outliers)]:
            row[column] = 0.0
        order = sorted(range(len(row)), key=lambda column: -abs(row[column]))
        for column in order[int(len(row) * density) :]:
            row[column] = 0.0
    return torch.tensor(rows, dtype=torch.float64).reshape(tau.shape)


def della_probabilities(tau, density, epsilon):
    """The chance of every entry of one parameter to be kept, by its rank in its row."""
    chances = torch.zeros(tau.shape, dtype=torch.float64).reshape(-1, tau.shape[-1])
    for row, values in enumerate(tau.reshape(-1, tau.shape[-1]).tolist()):
        order = sorted(range(len(values)), key=lambda column: abs(values[column]))
        for rank, column in enumerate(order, 1):
            chances[row, column] = density - epsilon + 2 * epsilon * (rank - 1) / (len(values) - 1)
    return chances.reshape(tau.shape)


def mag_max(taus, scale):
    """merge_max_abs."""
    changes = {}
    for key, tau in taus.items():
        largest = tau[0]
        for other in tau[1:]:
            largest = torch.where(other.abs() >= largest.abs(), other, largest)
        changes[key] = scale * largest
    return changes


def ram(taus, threshold, factor, clip=1.0, per_parameter=False):
    """agentic_reinforcement_merge_rescale_v2; ramplus_tl of mergekit if ratios are per parameter and clipped."""
    tasks = len(next(iter(taus.values())))
    rescale = {}
    for scope in [[key] for key in taus] if per_parameter else [list(taus)]:
        shared, unique = [0] * tasks, [0] * tasks
        for key in scope:
            for column in (taus[key].reshape(tasks, -1).abs() > threshold).T.tolist():
                for t in range(tasks):
                    shared[t] += column[t] and sum(column) > 1
                    unique[t] += column[t] and sum(column) == 1
        for key in scope:
            ratios = [shared[t] / unique[t] if unique[t] else 0.0 for t in range(tasks)]
            rescale[key] = [1 + (factor - 1) * min(clip, ratio) for ratio in ratios]
    changes = {}
    for key, tau in taus.items():
        flat, merged = tau.reshape(tasks, -1), []
        for column in range(flat.shape[1]):
            active = [t for t in range(tasks) if abs(flat[t, column]) > threshold]
            values = [float(flat[t, column]) * (rescale[key][t] if len(active) == 1 else 1) for t in active]
            merged.append(sum(values) / len(values) if values else 0.0)
        changes[key] = torch.tensor(merged, dtype=torch.float64).reshape(tau.shape[1:])
    return changes


def consensus(taus, together, threshold, least, scale):
    """`together` {key: [*shape]} is the multi-task vector, of Task Arithmetic or TIES; masks by generate_task_masks."""
    changes = {}
    for key, tau in taus.items():
        votes = torch.zeros(tau.shape[1:], dtype=torch.int64)
        for each in tau:
            votes += each.abs() > (together[key] - each).abs() * threshold
        changes[key] = scale * together[key] * (votes >= least)
    return changes


def pcb(taus, density, clip, agreement, scale):
    """vision_source_code/pcb.py ("normalised") and pcb-merging.py ("raw")."""
    tasks, keys = len(next(iter(taus.values()))), sorted(taus)
    flat = torch.cat([taus[key].reshape(tasks, -1) for key in keys], 1)
    d = flat.shape[1]

    def clamped(x, low, high):
        ordered = x.sort(1).values
        return x.clamp(ordered[:, int(d * low)][:, None], ordered[:, int(d * (1 - high) - 1)][:, None])

    def normalised(x):
        return (x - x.min(1, keepdim=True).values) / (x.max(1, keepdim=True).values - x.min(1, keepdim=True).values)

    magnitudes = clamped(flat.abs(), clip, clip)
    intra = torch.exp(tasks * normalised(magnitudes) ** 2)
    others = flat.sign() * normalised(magnitudes) if agreement == "normalised" else flat
    weights = normalised(clamped(intra * torch.tanh(flat * others.sum(0)), 1 - density, 0))
    merged = scale * (flat.sign() * magnitudes * weights).sum(0) / weights.sum(0).clamp(min=1e-12)
    parts = merged.split([taus[key][0].numel() for key in keys])
    return {key: part.reshape(taus[key].shape[1:]) for key, part in zip(keys, parts, strict=True)}


def sce(taus, density):
    """SCETask.execute of mergekit."""
    changes = {}
    for key, tau in taus.items():
        flat = tau.reshape(len(tau), -1).clone()
        if density < 1:
            variance = flat.var(0, unbiased=False)
            kept = variance.argsort(descending=True)[: int(density * int((variance != 0).sum()))]
            flat *= torch.zeros(flat.shape[1]).index_fill(0, kept, 1.0).double()
        shares = flat.square().sum(1)
        shares = shares / shares.sum() if shares.sum() > 0 else torch.full_like(shares, 1 / len(tau))
        merged = []
        for column in flat.T.tolist():
            sign = 1 if sum(column) >= 0 else -1
            weights = [float(share) * (value * sign > 0) for share, value in zip(shares, column, strict=True)]
            added = sum(weight * value for weight, value in zip(weights, column, strict=True))
            merged.append(added / (sum(weights) or 1))
        changes[key] = torch.tensor(merged, dtype=torch.float64).reshape(tau.shape[1:])
    return changes
