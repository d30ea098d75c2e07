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
