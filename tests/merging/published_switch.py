"""T-Switch, Auto-Switch, FlexSwitch and Localize-and-Stitch step by step in fp64; no code of ours is used."""

import math

import torch
from published_learned import AdamW


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


def grouped(entries, kept, bits):
    """The least bits of grouped COO with a code each, and the exponent of the groups' size, of every size."""
    costs, a = [], 0
    while 2 ** max(a - 1, 0) < entries or a == 0:
        costs.append((math.ceil(entries / 2**a) * (a + 1) + kept * (a + bits), a))
        a += 1
    return min(costs)


def quantised(values, bits):
    """Of the values that are kept: the middles of equal parts of the range of their sizes, rescaled to their norm."""
    sizes, signs = values.abs(), values.sign()
    low, high, parts = float(sizes.min()), float(sizes.max()), 2 ** (bits - 1)
    step = (high - low) / parts
    middles = []
    for size in sizes.tolist():
        part = min(int((size - low) / step), parts - 1) if step else 0
        middles.append(low + (part + 0.5) * step)
    middles = torch.tensor(middles, dtype=values.dtype)
    ratio = float(sizes.norm()) / float(middles.norm())
    return signs * middles * ratio, (low + step / 2) * ratio  # with the least level


def flex_switch(loss, base, taus, density, bits, temperature, penalty, steps, lr):
    """The known steps for one task, {key: [*shape]}, with autograd through straight-through gates; by Adam."""
    widths, free, optimizers = (1, 2, 4, 8), {}, {}
    total = sum(tau.numel() for tau in taus.values() if tau.ndim)
    for key, tau in taus.items():
        if tau.ndim:
            sizes = sorted((tau.abs() / tau.square().mean().sqrt()).flatten().tolist(), reverse=True)
            logits = [1.0 if width == bits else 0.0 for width in widths]
            first = sizes[max(1, round(density * len(sizes))) - 1]
            free[key] = torch.tensor([first, 1.0, *logits], dtype=torch.float64)
            optimizers[key] = AdamW(lr, 0.0)

    def change(key, numbers):
        tau = taus[key].flatten()
        gap = tau.abs() / tau.square().mean().sqrt() - numbers[0]
        where = (gap.detach() >= 0) & (tau != 0)
        values = []
        for width in widths:
            value, least = quantised(tau[where], width) if where.any() else (tau[where], 0.0)
            values.append((tau.sign() * least).masked_scatter(where, value))
        soft = (gap / temperature).sigmoid()
        gate = where.double() + soft - soft.detach()
        shares = numbers[2:].softmax(0)
        choice = torch.eye(4, dtype=torch.float64)[numbers[2:].argmax()] + shares - shares.detach()
        bits_each = sum(share * width for share, width in zip(choice, widths, strict=True))
        _, a = grouped(len(tau), int(where.sum()), int(bits_each.detach().round()))
        cost = math.ceil(len(tau) / 2**a) * (a + 1) + gate.sum() * (a + bits_each)
        value = sum(share * value for share, value in zip(choice, values, strict=True))
        return (numbers[1] * gate * value).view(taus[key].shape), cost

    def changes(numbers):
        return {key: change(key, numbers[key]) if tau.ndim else (tau, 0.0) for key, tau in taus.items()}

    for _ in range(steps):
        numbers = {key: known.clone().requires_grad_() for key, known in free.items()}
        made = changes(numbers)
        value = loss({key: (base[key] + made[key][0]).float() for key in taus})
        value = value + penalty * sum(cost for _, cost in made.values()) / total
        for key, slope in zip(numbers, torch.autograd.grad(value, [*numbers.values()]), strict=True):
            free[key] = optimizers[key].moved(free[key], slope)
            free[key][0].clamp_(min=0)
    return {key: (made.detach(), float(cost)) for key, (made, cost) in changes(free).items()}
