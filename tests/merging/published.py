"""Published merge methods, written down step by step from the papers in fp64 and sharing no code with merging/.

Each maps task vectors {key: [T, *shape]} to the change of the base {key: [*shape]}.
"""

import torch
from torch.linalg import svd


def average(taus):
    return {key: sum(tau) / len(tau) for key, tau in taus.items()}


def task_arithmetic(taus, scale):
    return {key: scale * sum(tau) for key, tau in taus.items()}


def ties(taus, density, merge, scale):
    tasks = len(next(iter(taus.values())))
    flat = torch.cat([taus[key].reshape(tasks, -1) for key in sorted(taus)], 1)
    entries = flat.shape[1]
    if entries > int(entries * density):  # kthvalue(0) does not exist: density 1 trims nothing
        threshold = flat.abs().kthvalue(entries - int(entries * density), dim=1, keepdim=True).values
        flat = flat * (flat.abs() >= threshold)
    sign = flat.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    agreeing = flat * torch.where(sign > 0, flat > 0, flat < 0)
    merged = agreeing.sum(0)
    if merge == "mean":
        merged = merged / (agreeing != 0).sum(0).clamp(min=1)
    sizes = [taus[key][0].numel() for key in sorted(taus)]
    parts = zip(sorted(taus), merged.split(sizes), strict=True)
    return {key: scale * part.reshape(taus[key].shape[1:]) for key, part in parts}


def dare(taus, masks, drop, then):
    return then({key: tau * masks[key] / (1 - drop) for key, tau in taus.items()})


def emr(taus, per_parameter=True):
    """One change per task: {key: [T, *shape]}."""
    tasks = len(next(iter(taus.values())))
    unified, masks = {}, {}
    for key, tau in taus.items():
        flag = torch.where(sum(tau) / tasks > 0, 1.0, -1.0).double()
        masks[key] = torch.stack([(tau[t] * flag > 0).double() for t in range(tasks)])
        largest = torch.zeros_like(flag)
        for t in range(tasks):
            largest = torch.maximum(largest, (masks[key][t] * tau[t]).abs())
        unified[key] = largest * flag
    size = (lambda x: x.abs().mean()) if per_parameter else (lambda x: x.abs().sum())
    changes = {key: torch.zeros_like(tau) for key, tau in taus.items()}
    for t in range(tasks):
        wanted = sum(size(tau[t]) for tau in taus.values())
        rescaler = wanted / sum(size(masks[key][t] * unified[key]) for key in taus)
        for key in taus:
            changes[key][t] = rescaler * masks[key][t] * unified[key]
    return changes


def tall_masks(taus, threshold):
    """One change per task: {key: [T, *shape]}."""
    changes = {}
    for key, tau in taus.items():
        together = sum(tau)
        changes[key] = torch.stack([together * (each.abs() > threshold * (together - each).abs()) for each in tau])
    return changes


def _matrices(taus, scale, merge):
    """`merge` for matrices, the mean for all else, and one scale for both."""
    return {key: scale * (merge(tau) if tau.ndim == 3 else tau.mean(0)) for key, tau in taus.items()}


def _nearest_orthogonal(matrix):
    p, _, q = svd(matrix, full_matrices=False)
    return p @ q


def tsv_m(taus, scale):
    def merge(tau):
        tasks, m, n = tau.shape
        r = min(m, n)
        k = r // tasks
        u, s, v = torch.zeros(m, r).double(), torch.zeros(r).double(), torch.zeros(r, n).double()
        for t in range(tasks):
            slot = slice(t * k, (t + 1) * k)
            u_t, s_t, v_t = svd(tau[t], full_matrices=False)
            u[:, slot], s[slot], v[slot] = u_t[:, :k], s_t[:k], v_t[:k]
        return _nearest_orthogonal(u) @ torch.diag(s) @ _nearest_orthogonal(v)

    return _matrices(taus, scale, merge)


def iso_c(taus, scale):
    def merge(tau):
        u, s, v = svd(tau.sum(0), full_matrices=False)
        return s.mean() * u @ v

    return _matrices(taus, scale, merge)


def iso_cts(taus, common, scale):
    def merge(tau):
        tasks, r = len(tau), min(tau.shape[1:])
        specific = round((r - int(r * common)) / tasks)
        kept = r - specific * tasks
        u, s, v = svd(tau.sum(0), full_matrices=False)
        u, s, v = u[:, :kept], s[:kept], v[:kept]
        us, ss, vs = [], [], []
        for each in tau:
            u_t, s_t, v_t = svd(each - u @ u.T @ each, full_matrices=False)
            us, ss, vs = [*us, u_t[:, :specific]], [*ss, s_t[:specific]], [*vs, v_t[:specific]]
        left, right = _nearest_orthogonal(torch.cat([*us, u], 1)), _nearest_orthogonal(torch.cat([*vs, v]))
        return torch.cat([*ss, s]).mean() * left @ right

    return _matrices(taus, scale, merge)
