"""Stacks of matrices [T, m, n] to decompose."""

import torch


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def structured(tasks, m, n, shared=4, own=2, noise=0.3):
    """Shared subspaces, a low-rank part of every task's own, and noise."""
    common = gaussian(m, shared, seed=1) @ gaussian(tasks, shared, shared, seed=2) @ gaussian(shared, n, seed=3)
    return common + gaussian(tasks, m, own, seed=4) @ gaussian(tasks, own, n, seed=5) + noise * gaussian(tasks, m, n)


def unfold(stack, mode):
    return stack.double().movedim(mode, 0).flatten(1)


def squared(spectrum, rank):
    return float(spectrum[rank:].square().sum())
