"""Published merges whose numbers are searched for, written down step by step, for given numbers."""

import itertools
import math

import torch


def evo_adapter(pairs, alphas, betas):
    """Public code of Evo-Merging: [(A, B), ...] to one pair."""
    fused_a, fused_b = torch.zeros_like(pairs[0][0]), torch.zeros_like(pairs[0][1])
    for (a, b), alpha, beta in zip(pairs, alphas, betas, strict=True):
        magnitudes = sorted(a.abs().flatten().tolist(), reverse=True)
        count = min(max(round(a.numel() * alpha), 1), a.numel())
        kept = a.clone()
        for row in range(a.shape[0]):
            for column in range(a.shape[1]):
                if alpha == 0.0 or abs(float(a[row, column])) < magnitudes[count - 1]:
                    kept[row, column] = 0
        fused_a += beta * kept
        fused_b += beta * b
    return fused_a, fused_b


def map_score(coefficients, factors, bounded):
    """Public code of MAP: squares, products, coordinates and the constant, in its order, through the sigmoid."""
    total, index = 0.0, 0
    for c in coefficients:
        total += factors[index] * c**2
        index += 1
    for first, second in itertools.combinations(range(len(coefficients)), 2):
        total += factors[index] * coefficients[first] * coefficients[second]
        index += 1
    for c in coefficients:
        total += factors[index] * c
        index += 1
    total += factors[index]
    return 1 / (1 + math.exp(-total)) if bounded else total
