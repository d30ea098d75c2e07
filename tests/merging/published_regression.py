"""Published methods that look at what goes into layers, written down step by step and sharing no code with merging/.

Models are vision towers of Hugging Face's CLIP, whose layers are all modules; states are dicts of tensors.
"""

import torch
from torch import nn
from torch.nn import functional


def loaded(build, state):
    module = build()
    module.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return module


@torch.no_grad()
def inputs(module, *args, **kwargs):
    """What goes into linear layers, patches and norms (normalised, not scaled), fp64 [B, N, n] by name; the output."""
    seen, handles = {}, []

    def note(name, layer, x):
        if isinstance(layer, nn.Conv2d):
            x = functional.unfold(x, layer.kernel_size, stride=layer.stride).transpose(1, 2)
        if isinstance(layer, nn.LayerNorm):
            x = functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        seen[name] = x.double()

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.LayerNorm | nn.Conv2d):
            handles.append(layer.register_forward_pre_hook(lambda layer, args, name=name: note(name, layer, args[0])))
    output = module(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen, output


def rows(x):
    return x.flatten(0, -2)


def _mean(states):
    return {key: sum(state[key].double() for state in states) / len(states) for key in states[0]}


def lot(build, base, experts, images, cutoff, scale):
    seen = [inputs(loaded(build, state), x)[0] for state, x in zip(experts, images, strict=True)]
    merged = {}
    for key, start in base.items():
        taus = [state[key].double() - start.double() for state in experts]
        name, _, kind = key.rpartition(".")
        change = sum(taus) / len(taus)
        if kind == "weight" and name in seen[0]:
            xs = [rows(of[name]) for of in seen]
            if start.ndim == 1:
                energies = [(x * x).sum(0) for x in xs]
                change = sum(e * tau for e, tau in zip(energies, taus, strict=True)) / sum(energies)
            else:
                right = sum(x.T @ (x @ tau.flatten(1).T) for x, tau in zip(xs, taus, strict=True))
                inverse = torch.linalg.pinv(sum(x.T @ x for x in xs), rtol=cutoff, hermitian=True)
                change = (inverse @ right).T.reshape(start.shape)
        merged[key] = start.double() + scale * change
    return merged


def stem(model, images):
    with torch.no_grad():
        return model.pre_layrnorm(model.embeddings(images))


def layer_inputs(model, index, hidden):
    return inputs(model.encoder.layers[index], hidden, attention_mask=None)


def reg_mean_pp(build, base, experts, images, rho):
    """FusionBench's RegMean++, with what lies behind the blocks averaged."""
    merged = _mean(experts)
    model, models = loaded(build, merged), [loaded(build, state) for state in experts]
    hidden = [stem(model, x) for x in images]
    for index, layer in enumerate(model.encoder.layers):
        total, moved = {}, {}
        for expert, x in zip(models, hidden, strict=True):
            for name, seen in layer_inputs(expert, index, x)[0].items():
                module = expert.encoder.layers[index].get_submodule(name)
                if isinstance(module, nn.Linear):
                    gram = rows(seen).T @ rows(seen) / len(rows(seen))
                    gram = rho * gram + (1 - rho) * torch.diag(torch.diag(gram))
                    total[name] = total.get(name, 0) + gram
                    moved[name] = moved.get(name, 0) + gram @ module.weight.detach().double().T
        for name, gram in total.items():
            merged[f"encoder.layers.{index}.{name}.weight"] = (torch.linalg.inv(gram) @ moved[name]).T
        state = {key: tensor.float() for key, tensor in merged.items() if key.startswith(f"encoder.layers.{index}.")}
        layer.load_state_dict({key.split(".", 3)[3]: tensor for key, tensor in state.items()})
        hidden = [layer_inputs(model, index, x)[1] for x in hidden]
    return merged


def feat_cal(build, base, start, experts, images, ridge, extrapolation, mix, unread):
    """The authors' calibration of the model `start`, in fp64."""
    merged = {key: tensor.clone() for key, tensor in start.items()}
    model, models = loaded(build, start), [loaded(build, state) for state in experts]
    ours = [stem(model, x) for x in images]
    theirs = [stem(expert, x) for expert, x in zip(models, images, strict=True)]
    for index, layer in enumerate(model.encoder.layers):
        last, prefix = index == len(model.encoder.layers) - 1, f"encoder.layers.{index}."
        seen, new = [], []
        for expert, xs, xe in zip(models, ours, theirs, strict=True):
            expert_seen, output = layer_inputs(expert, index, xe)
            seen.append((layer_inputs(model, index, xs)[0], expert_seen))
            new.append(output)
        for name, module in layer.named_modules():
            if name in seen[0][0]:
                weights = torch.ones(rows(seen[0][0][name]).shape[0]).double()
                if last and not name.endswith(("k_proj", "v_proj")):
                    weights = weights.view(seen[0][0][name].shape[:2])
                    weights[:, 1:] = unread
                    weights = weights.flatten()
                pairs = [(rows(a[name]), rows(b[name])) for a, b in seen]
                solve = _linear if isinstance(module, nn.Linear) else _norm
                states = [[state[prefix + name + end].double() for end in (".weight", ".bias")] for state in experts]
                anchor = [
                    extrapolation * start[prefix + name + end].double()
                    + (1 - extrapolation) * base[prefix + name + end].double()
                    for end in (".weight", ".bias")
                ]
                solution = solve(pairs, weights / weights.sum(), states, anchor, ridge, mix)
                merged[prefix + name + ".weight"], merged[prefix + name + ".bias"] = solution
        layer.load_state_dict({k.removeprefix(prefix): v.float() for k, v in merged.items() if k.startswith(prefix)})
        ours, theirs = [layer_inputs(model, index, x)[1] for x in ours], new
    return merged


def _linear(pairs, w, states, anchor, ridge, mix):
    left, right, outputs, sizes, means = 0, 0, 0, 0, []
    for (xs, xe), (weight, _) in zip(pairs, states, strict=True):
        xt = mix * xe + (1 - mix) * xs
        covariance = xs.T @ (w[:, None] * xs)
        size = covariance.norm()
        left, right = left + covariance / size, right + xs.T @ (w[:, None] * xt) / size @ weight.T
        means.append((w @ xs, w @ xt, size))
    left = left + (ridge + 1e-8) * torch.eye(len(left)).double()
    merged = torch.linalg.solve(left, right + ridge * anchor[0].T).T
    for (ms, mt, size), (weight, bias) in zip(means, states, strict=True):
        outputs = outputs + (bias + weight @ mt - merged @ ms) / size
        sizes = sizes + 1 / size
    return merged, (outputs + ridge * anchor[1]) / (sizes + ridge)


def _norm(pairs, w, states, anchor, ridge, mix):
    energies, means = [w @ (xs * xs) for xs, _ in pairs], [w @ xs for xs, _ in pairs]
    weight, bias = torch.zeros_like(anchor[0]), torch.zeros_like(anchor[1])
    for channel in range(len(weight)):
        e, m = [float(x[channel]) for x in energies], [float(x[channel]) for x in means]
        gammas, betas = ([float(pair[side][channel]) for pair in states] for side in (0, 1))
        left = torch.tensor([[sum(e) + ridge, sum(m)], [sum(m), len(e) + ridge]]).double()
        right = torch.tensor([
            sum(e[t] * gammas[t] + m[t] * betas[t] for t in range(len(e))) + ridge * float(anchor[0][channel]),
            sum(m[t] * gammas[t] + betas[t] for t in range(len(e))) + ridge * float(anchor[1][channel]),
        ]).double()  # fmt: skip
        weight[channel], bias[channel] = torch.linalg.solve(left, right)
    return weight, bias


def fisher(taus, informations, normalise, floor):
    """The merge of MergeLM and FusionBench, of {key: [T, *shape]} and what is known of each expert {key: [*shape]}."""
    weights = [1.0] * len(informations)
    if normalise:
        norms = [torch.stack([value.norm() for value in known.values()]).norm() for known in informations]
        inverse = [1 / (norm + floor) for norm in norms]
        weights = [value / sum(inverse) for value in inverse]
    merged = {}
    for key, tau in taus.items():
        shares = [weight * (known[key] + floor) for weight, known in zip(weights, informations, strict=True)]
        merged[key] = sum(share * t for share, t in zip(shares, tau, strict=True)) / sum(shares)
    return merged


def information(module, logits_of, images, batch, expected):
    """What the same code knows of one expert; `expected` is the definition instead, sample by sample."""
    known = {key: torch.zeros_like(weight).double() for key, weight in module.named_parameters()}
    for some in images.split(1 if expected else batch):
        logits = logits_of(module(some))
        probabilities = logits.softmax(-1).detach()
        losses = [(probabilities.sqrt() * logits.log_softmax(-1)).sum()]
        weights = [1.0]
        if expected:
            losses, weights = list(logits.log_softmax(-1)[0]), probabilities[0].tolist()
        for loss, weight in zip(losses, weights, strict=True):
            module.zero_grad()
            loss.backward(retain_graph=True)
            for key, parameter in module.named_parameters():
                known[key] += weight * parameter.grad.double() ** 2
    return {key: value / len(images) for key, value in known.items()}
