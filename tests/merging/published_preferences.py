"""PWE-MoE step by step with autograd; as in published.py, no code is shared but published_masks.adam."""

import torch
from published_masks import adam


def pwe_moe(base, taus, modules, nets, losses, rays, init, lrs, preference):
    """ParetoWeightEnsemblingModule, trained by linear scalarisation; the weights at a preference.

    modules: by parameter the index of its net, None outside; nets: of each [(W, b), ...], one or two layers; losses: of
    every step one function of weights per task; rays: of every step the preference [T]; lrs: of every step.
    """
    nets = [[(w.clone().requires_grad_(), b.clone().requires_grad_()) for w, b in layers] for layers in nets]
    leaves = [leaf for layers in nets for pair in layers for leaf in pair]
    moments = [(torch.zeros_like(leaf), torch.zeros_like(leaf)) for leaf in leaves]

    def gate(layers, ray):
        hidden = ray
        for number, (w, b) in enumerate(layers):
            hidden = torch.stack([(row * hidden).sum() + bias for row, bias in zip(w, b, strict=True)])
            hidden = hidden.clamp(min=0) if number + 1 < len(layers) else hidden
        return hidden

    def merged(ray):
        weights = {}
        for key, weight in base.items():
            index = modules[key]
            shares = [init] * len(taus[key]) if index is None else gate(nets[index], ray)
            weights[key] = weight + sum(share * tau for share, tau in zip(shares, taus[key], strict=True))
        return weights

    for step, (of_tasks, ray, lr) in enumerate(zip(losses, rays, lrs, strict=True), 1):
        weights = merged(ray)
        value = sum(share * loss(weights) for share, loss in zip(ray, of_tasks, strict=True))
        gradients = torch.autograd.grad(value, leaves)
        for leaf, gradient, moment in zip(leaves, gradients, moments, strict=True):
            adam(leaf, gradient, moment, step, lr)
    with torch.no_grad():
        return merged(preference)
