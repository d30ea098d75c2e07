"""Published methods that work matrix by matrix, written down step by step in fp64, sharing no code with merging/.

Each maps task vectors {key: [T, *shape]} to the change of the base {key: [*shape]}, or a stack [T, m, n] to [m, n].
"""

import math

import torch
from torch.linalg import eigh, svd


def _matrices(taus, merge):
    """`merge` for matrices, the mean for all else."""
    return {key: merge(tau) if tau.ndim == 3 else sum(tau) / len(tau) for key, tau in taus.items()}


def _normal_equations(tau):
    """C and D of WUDI's loss: its minimum is D C^-1."""
    c = sum(t.T @ t / t.square().sum() for t in tau)
    d = sum(t @ t.T @ t / t.square().sum() for t in tau)
    values, vectors = eigh(c)
    return d, values.clamp(min=1e-8), vectors


def swudi(taus, f, kept):
    """f: of one eigenvalue and the largest."""

    def merge(tau):
        d, values, v = _normal_equations(tau)
        n = len(values)
        weights = torch.tensor([f(float(value), float(values.max())) for value in values]).double()
        weights[: n - math.ceil(n * kept)] = 0  # ascending
        start = sum(tau)
        minimum = d @ v @ torch.diag(1 / values) @ v.T
        return start + (minimum - start) @ v @ torch.diag(weights) @ v.T

    return _matrices(taus, merge)


def aswudi(taus, rank):
    """rank: of the list of eigenvalues."""

    def merge(tau):
        d, values, v = _normal_equations(tau)
        count = math.ceil(rank(values.tolist()))
        leading = v[:, len(values) - count :]
        exact = d @ leading @ torch.diag(1 / values[len(values) - count :]) @ leading.T
        return exact + sum(tau) - sum(tau) @ leading @ leading.T

    return _matrices(taus, merge)


def opt_merge(taus, tuned, steps, lr, probe):
    """wudi_merging2 of the authors' scripts for InternVL (full) and Qwen2-VL (lora); probe="target" as their text."""

    def truncated(matrix, k):
        u, s, v = svd(matrix, full_matrices=False)
        return u[:, :k] @ torch.diag(s[:k]) @ v[:k], torch.diag(s[:k]) @ v[:k]

    def merge(tau):
        k, mean = min(tau.shape[1:]) // len(tau), tau.mean(0)
        targets, probes = [], []
        for t in tau:
            own, own_probe = truncated(t, k)
            centred, centred_probe = truncated(t - mean, k)
            targets.append(centred + mean if tuned == "full" else own)
            probes.append(centred_probe if probe == "target" and tuned == "full" else own_probe)
        x = torch.nn.Parameter(tau.sum(0) if tuned == "full" else mean.clone())
        optimizer = torch.optim.Adam([x], lr=lr) if tuned == "full" else torch.optim.SGD([x], lr=lr, momentum=0.9)
        for _ in range(steps):
            pairs = zip(tau, targets, probes, strict=True)
            losses = [((x - target) @ p.T).square().sum() / t.square().sum() for t, target, p in pairs]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
        return x.detach()

    return _matrices(taus, merge)


def doge(taus, eta, subspace, density, steps, lr):
    """DOGE_TA_Algorithm of fusion_bench, of the matrices given."""
    tasks = len(next(iter(taus.values())))
    deltas, lambdas = {}, {}
    for key, tau in taus.items():
        _, m, n = tau.shape
        r = min(m, n)
        k = r // tasks
        lambdas[key] = [eta / torch.linalg.norm(t) for t in tau]
        slots = torch.zeros(m, r).double()
        for i, t in enumerate(tau):
            slots[:, i * k : (i + 1) * k] = svd(t, full_matrices=False)[0][:, :k]
        basis = svd(slots, full_matrices=False)[0][:, : int(r / subspace)]
        delta = torch.nn.Parameter(torch.zeros(m, n).double())
        optimizer = torch.optim.Adam([delta], lr=lr)
        for _ in range(steps):
            summed = sum(factor * (t + delta) for factor, t in zip(lambdas[key], tau, strict=True))
            losses = [(t * (t - summed)).sum(1).pow(2).sum() for t in tau]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            delta.grad -= basis @ basis.T @ delta.grad
            optimizer.step()
        deltas[key] = delta.detach()
    changes = {key: torch.zeros_like(delta) for key, delta in deltas.items()}
    for i in range(tasks):
        flat = torch.cat([taus[key][i].reshape(-1) for key in sorted(taus)])
        threshold = flat.abs().kthvalue(len(flat) - int(len(flat) * density)).values
        for key, tau in taus.items():
            changes[key] += lambdas[key][i] * (tau[i].abs() >= threshold) * (tau[i] + deltas[key])
    return changes


def _nearest_orthogonal(matrix):
    p, _, q = svd(matrix, full_matrices=False)
    return p @ q


def dc_merge(taus, kept, smoothing, rho, rank):
    """dc_merge of the authors' DC_utils.py (rank None), and of their LoRA code (a rank and smoothing)."""

    def merge(tau):
        tasks, m, n = tau.shape
        r = min(m, n)
        k = r // tasks if rank is None else rank
        us, vs, truncated = torch.zeros(m, r).double(), torch.zeros(r, n).double(), []
        for i, t in enumerate(tau):
            u, s, v = svd(t, full_matrices=False)
            us[:, i * k : (i + 1) * k], vs[i * k : (i + 1) * k] = u[:, :k], v[:k]
            s = s[:k]
            if smoothing == "average":
                s = s.sum() * torch.ones(k).double() / k
            elif smoothing == "linear":
                shares = torch.linspace(min(rho, float(s[0] / s[-1])), 1.0, k).double()
                s = s.sum() * shares / shares.sum()
            truncated.append(u[:, :k] @ torch.diag(s) @ v[:k])
        left, right = _nearest_orthogonal(us), _nearest_orthogonal(vs)
        if rank is not None:
            left, right = left[:, : tasks * k], right[: tasks * k]
        cores = []
        for matrix in truncated:
            core = left.T @ matrix @ right.T
            threshold = torch.topk(core.abs().view(-1), max(1, int(kept * core.numel()))).values.min()
            cores.append(core * (core.abs() >= threshold))
        merged = torch.zeros_like(cores[0])
        for i in range(len(merged)):
            for j in range(len(merged)):
                entries = [float(core[i, j]) for core in cores]
                agreeing = [entry for entry in entries if entry * sum(entries) > 0]
                if agreeing and i // k == j // k:
                    merged[i, j] = sum(agreeing) / len(agreeing)
        return left @ merged @ right

    return _matrices(taus, merge)


def opcm(taus, order, alpha, zero_diagonal):
    """OPCMForCLIP of fusion_bench: taus of one matrix each, projected where `w` and added up elsewhere."""
    merged = {key: tau[order[0]].clone() for key, tau in taus.items()}
    norm = lambda changes: torch.cat([change.flatten() for change in changes]).norm()  # noqa: E731
    norms, previous = [norm(merged.values())], 1.0
    for task in order[1:]:
        norms.append(norm([tau[task] for tau in taus.values()]))
        for key, tau in taus.items():
            change = tau[task]
            if tau.ndim == 3:
                u, s, vh = svd(merged[key], full_matrices=True)
                split = int((s.cumsum(0) / s.sum() > alpha).float().argmax())
                projected = u.T @ change @ vh.T
                if zero_diagonal:
                    projected.diagonal().fill_(0)
                projected[:split, :split] = 0
                change = u @ projected @ vh
            merged[key] = previous * merged[key] + change
        average, size = sum(norms) / len(norms), norm(merged.values())
        previous = size / average
        merged = {key: change * average / size for key, change in merged.items()}
    return merged


def knots_ties(taus, density, scale):
    """SVDMerger of the authors' task_merger.py with TIES by mean, of the matrices given."""
    tasks = len(next(iter(taus.values())))
    bases, rows = {}, [[] for _ in range(tasks)]
    for key in sorted(taus):
        u, s, v = svd(torch.cat(list(taus[key]), 1), full_matrices=False)
        bases[key], s, v = u[:, s > 1e-5], s[s > 1e-5], v[s > 1e-5]
        for task, part in enumerate(v.chunk(tasks, 1)):
            rows[task].append(torch.diag(s) @ part)
    flat = torch.stack([torch.cat([z.reshape(-1) for z in zs]) for zs in rows])
    threshold = flat.abs().kthvalue(flat.shape[1] - int(flat.shape[1] * density), dim=1, keepdim=True).values
    flat = flat * (flat.abs() >= threshold)
    sign = flat.sum(0).sign()
    agreeing = flat * scale * (flat * sign > 0)
    merged = agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
    parts = merged.split([z.numel() for z in rows[0]])
    return {key: bases[key] @ part.view_as(z) for key, part, z in zip(sorted(taus), parts, rows[0], strict=True)}


def _nearly_orthogonal(matrices, gamma, steps, lr):
    """Matrices [r, n] plus what makes their rows orthogonal to each other's, by Adam."""
    size = torch.cat([matrix.flatten() for matrix in matrices]).square().mean().sqrt()
    deltas = [torch.nn.Parameter(torch.zeros_like(matrix)) for matrix in matrices]
    optimizer = torch.optim.Adam(deltas, lr=float(lr * size))
    for _ in range(steps):
        moved = [matrix + delta for matrix, delta in zip(matrices, deltas, strict=True)]
        pairs = [(one, other) for i, one in enumerate(moved) for j, other in enumerate(moved) if i != j]
        losses = [(one @ other.T).square().sum() for one, other in pairs]
        losses += [gamma * delta.square().sum() for delta in deltas]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    return [(matrix + delta).detach() for matrix, delta in zip(matrices, deltas, strict=True)]


def do_merging(factors, gamma, steps, lr):
    """Of one matrix known by factors up [m, r] and down [r, n] of every task."""
    balanced = [
        (up * (down.norm() / up.norm()).sqrt(), down * (up.norm() / down.norm()).sqrt()) for up, down in factors
    ]
    ups = _nearly_orthogonal([up.T for up, _ in balanced], gamma, steps, lr)
    downs = _nearly_orthogonal([down for _, down in balanced], gamma, steps, lr)
    products = [up.T @ down for up, down in zip(ups, downs, strict=True)]
    magnitude = torch.stack([product.norm(dim=0) for product in products]).mean(0)
    direction = torch.stack([product / product.norm(dim=0) for product in products]).mean(0)
    return magnitude * direction


def resm(taus, sigmas):
    """TSV-Merging's steps with this library's guess at weights and ranks."""

    def merge(tau):
        tasks, entries = len(tau), [[float(x) for x in t.flatten()] for t in tau]
        level = sum(abs(x) for t in entries for x in t) / sum(map(len, entries))
        above = [sum(abs(x) > level for x in t) for t in entries]
        outliers = []
        for t in entries:
            mean = sum(t) / len(t)
            deviation = (sum((x - mean) ** 2 for x in t) / len(t)) ** 0.5
            outliers.append(sum(x * x for x in t if abs(x - mean) > sigmas * deviation) ** 0.5)
        us, ss, vs = [], [], []
        for t in range(tasks):
            k = min(tau.shape[1:]) * above[t] // sum(above)
            u, s, v = torch.linalg.svd(tau[t], full_matrices=False)
            us.append(u[:, :k])
            ss.append(s[:k] * tasks * outliers[t] / sum(outliers))
            vs.append(v[:k])
        return _nearest_orthogonal(torch.cat(us, 1)) @ torch.diag(torch.cat(ss)) @ _nearest_orthogonal(torch.cat(vs))

    return _matrices(taus, merge)
