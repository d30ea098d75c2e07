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


def recombined(base, experts, components, genome):
    """MERGE as it is described: {component: [keys]} and {component: {task: number of its group}}, by averaging.

    The model of every task, the library's modules {(component, tasks): {key: tensor}}, and the storage: numbers of all
    modules over those of the experts.
    """
    library, kept, whole = {}, 0, 0
    for component, keys in components.items():
        for number in genome[component].values():
            members = tuple(task for task in genome[component] if genome[component][task] == number)
            if (component, members) not in library:
                module = {}
                for key in keys:
                    module[key] = torch.zeros_like(base[key], dtype=torch.float64)
                    for task in members:
                        module[key] += experts[task][key].double() / len(members)
                    kept += base[key].numel()
                library[component, members] = module
        whole += len(experts) * sum(base[key].numel() for key in keys)
    routed = {key for keys in components.values() for key in keys}
    models = {}
    for task in experts:
        model = {key: sum(expert[key].double() for expert in experts.values()) / len(experts)
                 for key in base if key not in routed}  # fmt: skip
        for (_, members), module in library.items():
            if task in members:
                model.update(module)
        models[task] = model
    return models, library, kept / whole
