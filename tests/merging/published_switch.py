"""T-Switch, Auto-Switch and Localize-and-Stitch step by step in fp64; as in published.py, no code is shared."""

import math

import torch


def t_switch(taus, drop):
    """process_matrix and binarize_matrix: one change per task, {key: [T, *shape]}."""
    changes = {key: tau.clone() for key, tau in taus.items()}
    for change in changes.values():
        for task in change if change.ndim > 1 else ():
            values, norm, count = task.reshape(-1).tolist(), 0.0, 0
            for sign in (1, -1):
                ordered = sorted((sign * value for value in values if sign * value > 0), reverse=True)
                keep = int(len(ordered) * (1 - drop))
                threshold = ordered[keep - 1] if keep else 0.0
                for index, value in enumerate(values):
                    if 0 < sign * value < threshold:
                        values[index] = 0.0
            for index, value in enumerate(values):
                norm, count = norm + value * value, count + (value != 0)
                values[index] = math.copysign(1.0, value) if value else 0.0
            scaling = math.sqrt(norm) / math.sqrt(count) if count else 0.0
            task.copy_(scaling * torch.tensor(values, dtype=torch.float64).reshape(task.shape))
    return changes


def retrieved(query, samples, tasks, classes, neighbours):
    """KNeighborsClassifier.predict_proba of one query [F], of samples [n, F] and their tasks."""
    distances = [math.dist(query.tolist(), sample) for sample in samples.tolist()]
    nearest = sorted(range(len(distances)), key=distances.__getitem__)[:neighbours]
    return [sum(int(tasks[index]) == task for index in nearest) / len(nearest) for task in range(classes)]


def localize_and_stitch(taus, sparsity):
    """create_basepatch, whose masks are rounded as they are, and Stitcher: {key: [*shape]}."""
    tasks = len(next(iter(taus.values())))
    kept = {key: torch.zeros_like(tau) for key, tau in taus.items()}
    for t in range(tasks):
        flat = torch.cat([tau[t].abs().reshape(-1) for tau in taus.values()])
        threshold = flat.topk(int(sparsity * len(flat))).values.min()
        for key, tau in taus.items():
            kept[key][t] = (tau[t].abs() > threshold).double()
    changes = {}
    for key, tau in taus.items():
        changes[key] = torch.zeros_like(tau[0])
        for t in range(tasks):
            others = sum((kept[key][t] * kept[key][s] for s in range(tasks) if s != t), torch.zeros_like(tau[0]))
            share = kept[key][t] + others
            changes[key] += torch.where(share > 0, 1 / share.clamp(min=1), 0.0) * kept[key][t] * tau[t]
    return changes
