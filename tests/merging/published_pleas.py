"""PLeaS written down for Hugging Face's CLIP towers, step by step and sharing no code with merging/."""

import torch
from published_regression import inputs, loaded, rows
from scipy.optimize import linear_sum_assignment
from torch import nn


def nearest(x, y):
    """For each feature of x [R, n] that of y it is matched with, and how far they are apart."""
    distances = torch.cdist(x.T, y.T)
    return linear_sum_assignment(distances.numpy())[1].tolist(), distances


def heads_nearest(x, y, asked, heads):
    """Orders of values, and of queries and keys, that keep heads together.

    x, y [R, n] are what leaves the heads; asked: queries [R, n] of both models, and their keys.
    """
    values = torch.cdist(x.T, y.T)
    queries = torch.stack([torch.cdist(one.T, two.T) for one, two in asked]).sum(0)
    size = len(values) // heads
    costs, inside = torch.zeros(heads, heads).double().numpy(), {}
    for h in range(heads):
        for g in range(heads):
            for name, table in (("v", values), ("q", queries)):
                part = table[h * size : (h + 1) * size, g * size : (g + 1) * size].numpy()
                inside[h, g, name] = linear_sum_assignment(part)
                costs[h, g] += part[inside[h, g, name]].sum()
    partner = linear_sum_assignment(costs)[1].tolist()
    return tuple([g * size + i for h, g in enumerate(partner) for i in inside[h, g, name][1].tolist()] for name in "vq")


def reordered(state, stream, hidden, attention=None):
    """The same function: features between blocks in the order `stream`, hidden neurons of block i in hidden[i].

    attention: orders of values, and of queries and keys, of block i.
    """
    turned = {}
    columns = ("position_embedding", "q_proj", "k_proj", "v_proj", "fc1", "visual_projection")
    for key, weight in state.items():
        last = key.split(".")[-2] if "." in key else key
        if key.endswith("class_embedding") or last in ("patch_embedding", "out_proj", "fc2") or "norm" in last:
            weight = weight[stream]
        elif last in columns and weight.ndim == 2:
            weight = weight[:, stream]
        if last in ("fc1", "fc2"):
            order = hidden[int(key.split("layers.")[1].split(".")[0])]
            weight = weight[order] if last == "fc1" else weight[:, order] if weight.ndim == 2 else weight
        if attention and "self_attn" in key:
            v, q = attention[int(key.split("layers.")[1].split(".")[0])]
            if last == "out_proj":
                weight = weight[:, v] if weight.ndim == 2 else weight
            else:
                weight = weight[v if last == "v_proj" else q]
        turned[key] = weight
    return turned


def pleas(build, states, images, ratio, stream, ridge, heads=None, solve=True):
    models = [loaded(build, state) for state in states]
    seen = [{name: rows(x) for name, x in inputs(model, images)[0].items()} for model in models]
    blocks = sum(name.endswith("fc2") for name in seen[0])
    prefix = next(name for name in seen[0] if name.endswith("layers.0.mlp.fc2"))[: -len("0.mlp.fc2")]
    width = seen[0][f"{prefix}0.mlp.fc1"].shape[1]
    total, hidden, shares, attention = torch.zeros(width, width).double(), [], [], []
    for block in range(blocks):
        for name in (f"{prefix}{block}.self_attn.q_proj", f"{prefix}{block}.mlp.fc1"):
            total = total + torch.cdist(seen[0][name].T, seen[1][name].T)
        if heads:
            at = f"{prefix}{block}.self_attn."
            asked = []
            for part in (f"{at}q_proj", f"{at}k_proj"):
                layers = [(state[f"{part}.weight"].double(), state[f"{part}.bias"].double()) for state in states]
                asked.append([of[part] @ w.T + b for of, (w, b) in zip(seen, layers, strict=True)])
            attention.append(heads_nearest(seen[0][f"{at}out_proj"], seen[1][f"{at}out_proj"], asked, heads))
        order, distances = nearest(*(each[f"{prefix}{block}.mlp.fc2"] for each in seen))
        far = [float(distances[i, j]) for i, j in enumerate(order)]
        kept = sorted(range(len(far)), key=lambda i: far[i])[: round(ratio * len(far))]
        hidden.append(order)
        shares.append(torch.tensor([0.5 if i in kept else 1.0 for i in range(len(far))]).double())
    running = linear_sum_assignment(total.numpy())[1].tolist() if stream else list(range(width))
    states = [states[0], reordered(states[1], running, hidden, attention)]
    seen[1] = {name: rows(x) for name, x in inputs(loaded(build, states[1]), images)[0].items()}
    merged = {key: (states[0][key].double() + states[1][key].double()) / 2 for key in states[0]}
    for name, layer in models[0].named_modules() if solve else ():
        if isinstance(layer, nn.Linear):
            into, out = torch.full((layer.in_features,), 0.5).double(), torch.full((layer.out_features,), 0.5).double()
            if name.endswith("fc1"):
                out = shares[int(name.split("layers.")[1].split(".")[0])]
            if name.endswith("fc2"):
                into = shares[int(name.split("layers.")[1].split(".")[0])]
            _solve(merged, name, states, [each[name] for each in seen], into, out, ridge)
    return merged


def _solve(merged, name, states, seen, into, out, ridge):
    x, y = seen
    weights = [state[f"{name}.weight"].double() for state in states]
    biases = [state.get(f"{name}.bias", torch.zeros(len(out))).double() for state in states]
    z = into * x + (1 - into) * y
    target = out * (x @ weights[0].T + biases[0]) + (1 - out) * (y @ weights[1].T + biases[1])
    anchor = out[:, None] * weights[0] + (1 - out)[:, None] * weights[1] * (into < 1)
    known = f"{name}.bias" in states[0]
    wide = torch.cat([z, torch.ones(len(z), 1).double()], 1) if known else z
    spread = z - z.mean(0) if known else z
    penalty = ridge * float((spread**2).sum(0).mean() / len(z))
    diagonal = torch.cat([torch.full((z.shape[1],), penalty), torch.zeros(wide.shape[1] - z.shape[1])]).double()
    right = wide.T @ target / len(z)
    right[: z.shape[1]] += penalty * anchor.T
    solution = torch.linalg.solve(wide.T @ wide / len(z) + torch.diag(diagonal), right).T
    merged[f"{name}.weight"] = solution[:, : z.shape[1]]
    if known:
        merged[f"{name}.bias"] = solution[:, -1]
