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
