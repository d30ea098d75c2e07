"""Published steps of methods that learn, written down again with plain loops and autograd through task vectors.

`loss` is a function of all weights {key: tensor}; base {key: tensor}, taus {key: [T, *shape]}.
"""

import torch


class AdamW:
    """Adam with decoupled weight decay, by its formulas."""

    def __init__(self, lr, decay):
        self.lr, self.decay, self.step, self.mean, self.square = lr, decay, 0, 0.0, 0.0

    def moved(self, value, gradient):
        self.step += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.step), self.square / (1 - 0.999**self.step)
        return value * (1 - self.lr * self.decay) - self.lr * mean / (square.sqrt() + 1e-8)


def clipped(gradient, limit):
    """By the norm of all of it."""
    norm = float(gradient.norm())
    return gradient * limit / norm if norm > limit else gradient


def atlas(loss, base, taus, steps, lr, decay, init, gamma, p):
    """fredzzhang/atlas: learn_task_addition.py, composition.py. Changes of every parameter."""
    tasks, keys, optimizer = len(next(iter(taus.values()))), list(taus), AdamW(lr, decay)
    coefficients = torch.full((tasks, len(keys)), init)
    for _ in range(steps):
        c = coefficients.clone().requires_grad_()
        weights = {}
        for i, key in enumerate(keys):
            weights[key] = base[key]
            for t in range(tasks):
                weights[key] = weights[key] + c[t, i] * taus[key][t]
        total = loss(weights)
        if gamma:
            norms = [sum(abs(c[t, i]) ** p for t in range(tasks)) ** (1 / p) for i in range(len(keys))]
            total = total + gamma * sum(norms) / len(keys)
        (gradient,) = torch.autograd.grad(total, c)
        coefficients = optimizer.moved(coefficients, clipped(gradient, 1.0))
    return {key: sum(coefficients[t, i] * taus[key][t] for t in range(tasks)) for i, key in enumerate(keys)}


def expert_merging(loss, base, taus, steps, lr, decay, init, rho, counts):
    """Littleor/ExpertMerging: expert_merging_base.py, merging_utils.py, for the matrices in `taus`.

    `counts` [key] are chunks of the flattened parameter; 0 keeps the coefficient at init. Coefficients {key: [T, m]}
    and changes.
    """
    tasks, learned = len(next(iter(taus.values()))), [key for key in taus if counts[key]]
    raw = {key: torch.full((tasks, counts[key]), init).logit() for key in learned}
    optimizers, number = {key: AdamW(lr, decay) for key in learned}, sum(map(counts.get, learned))

    def change(key, alpha):
        total = torch.zeros_like(taus[key][0])
        for t in range(tasks):
            pieces = taus[key][t].flatten().chunk(len(alpha[t]))
            total = total + torch.cat([a * piece for a, piece in zip(alpha[t], pieces, strict=False)]).view_as(total)
        return total

    fixed = torch.full((tasks, 1), init)
    for _ in range(steps):
        free = {key: value.clone().requires_grad_() for key, value in raw.items()}
        alpha = {key: free[key].sigmoid() if key in free else fixed for key in taus}
        weights = {key: base[key] + change(key, alpha[key]) if key in taus else base[key] for key in base}
        start = torch.full((1,), init).logit().sigmoid()
        distance = sum((alpha[key] - start).abs().sum() for key in learned) / number
        total = loss(weights) + tasks * rho * distance  # every sample adds rho times it, and there is one of every task
        gradients = torch.autograd.grad(total, [free[key] for key in learned])
        norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        for key, gradient in zip(learned, gradients, strict=True):
            raw[key] = optimizers[key].moved(raw[key], gradient / max(norm, 1.0))
    alpha = {key: raw[key].sigmoid() if key in raw else fixed for key in taus}
    return alpha, {key: change(key, alpha[key]) for key in taus}


def chunk_counts(alpha, taus, budget, power):
    """Expert Merging++: floor(B L I^power / sum I^power), I_l the normalised sum_k |alpha_kl| mean|tau_kl| n_l."""
    importance = {}
    for key, tau in taus.items():
        one = sum(abs(float(alpha[key][k, 0])) * float(tau[k].abs().mean()) * tau[k].numel() for k in range(len(tau)))
        importance[key] = one
    total = sum(importance.values())
    shares = {key: (one / total) ** power for key, one in importance.items()}
    return {key: int(budget * len(taus) * share / sum(shares.values())) for key, share in shares.items()}


def cat(loss, base, factors, start, steps, lr):
    """aksh555/LoRA-Soups: learnable_lora/lora/layer.py. factors {key: [(alpha / r, B, A)] per task}, start w [T, keys].

    Changes of the matrices.
    """
    keys, optimizer, w = list(factors), AdamW(lr, 0.0), start

    def changes(w):
        found = {}
        for i, key in enumerate(keys):
            share = w[:, i].exp() / w[:, i].exp().sum()
            found[key] = sum(share[t] * (s * (B @ A)) for t, (s, B, A) in enumerate(factors[key]))
        return found

    for _ in range(steps):
        free = w.clone().requires_grad_()
        change = changes(free)
        weights = {key: base[key] + change[key] if key in change else base[key] for key in base}
        (gradient,) = torch.autograd.grad(loss(weights), free)
        w = optimizer.moved(w, gradient)
    return changes(w)


def localize(loss, base, tau, density, bias, push, steps, lr):
    """uiuctml/Localize-and-Stitch: localize_utils.py, for one task, tau {key: [*shape]}. Masks of every parameter."""
    magnitudes = torch.cat([tau[key].abs().flatten() for key in tau]).sort(descending=True).values
    bound = magnitudes[max(1, int(density * len(magnitudes))) - 1]
    logits = {key: bias * (2.0 * (tau[key].abs() > bound) - 1) for key in tau}
    for _ in range(steps):
        weights = {key: (base[key] + logits[key].sigmoid() * tau[key]).requires_grad_() for key in tau}
        gradients = torch.autograd.grad(loss(weights), list(weights.values()))
        for key, gradient in zip(tau, gradients, strict=True):
            slope = logits[key].sigmoid() * (1 - logits[key].sigmoid())
            away = push * torch.where(logits[key] > 0, slope, -slope)
            logits[key] = logits[key] - lr * gradient * tau[key] * slope + away
    return {key: logits[key].sigmoid().round() for key in tau}


def stitch(masks, taus):
    """masks of every task; weight 1 / count where several have chosen an entry."""
    changes = {}
    for key, tau in taus.items():
        count = sum(mask[key] for mask in masks)
        changes[key] = sum(mask[key] * tau[t] for t, mask in enumerate(masks)) / count.clamp(min=1)
    return changes
