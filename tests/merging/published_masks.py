"""Methods that learn masks, coefficients or adapters, step by step; as in published.py, no code is shared."""

import torch


def adam(leaf, gradient, moments, step, lr):
    """One step of Adam on a tensor, in place; moments: two tensors that it changes, too."""
    first, second = moments
    first.mul_(0.9).add_(gradient, alpha=0.1)
    second.mul_(0.999).add_(gradient * gradient, alpha=0.001)
    unbiased = (second / (1 - 0.999**step)).sqrt() + 1e-8
    leaf.data -= lr * (first / (1 - 0.9**step)) / unbiased


def surgery(merged, expert, down, up, batches, lr):
    """AlphaWrapper.forward and the loop of main_TaskArithmetic_with_surgery for one task.

    merged, expert: features [n, D] of all its samples by the merged model and by the task's own; batches: rows of every
    step. Gives down [r, D] and up [D, r].
    """
    down, up = (tensor.clone().requires_grad_() for tensor in (down, up))
    moments = {id(leaf): (torch.zeros_like(leaf), torch.zeros_like(leaf)) for leaf in (down, up)}
    for step, rows in enumerate(batches, 1):
        loss, count = torch.zeros(()), 0
        for row in rows:
            hidden = torch.stack([(weights * merged[row]).sum().clamp(min=0) for weights in down])
            bias = torch.stack([(weights * hidden).sum() for weights in up])
            loss, count = loss + (merged[row] - bias - expert[row]).abs().sum(), count + len(bias)
        gradients = torch.autograd.grad(loss / count, (down, up))
        for leaf, gradient in zip((down, up), gradients, strict=True):
            adam(leaf, gradient, moments[id(leaf)], step, lr)
    return down.detach(), up.detach()


def relaxed(logits, uniform, temperature):
    """RelaxedBernoulli(logits).rsample() divided by its mean, by parameter."""
    masks = {}
    for key, x in logits.items():
        sample = torch.sigmoid((uniform[key].log() - (1 - uniform[key]).log() + x) / temperature)
        masks[key] = sample / sample.mean()
    return masks


def moved(base, taus, coefficients, masks):
    """merge_weights(task_vector_mask): coefficients [T, 1] or [T, L] in the order of keys."""
    weights = {}
    for index, (key, weight) in enumerate(base.items()):
        for coefficient, tau in zip(coefficients, taus[key], strict=True):
            weight = weight + coefficient[min(index, len(coefficient) - 1)] * (masks[key] * tau)
        weights[key] = weight
    return weights


def concrete(base, taus, losses, uniforms, scaling, temperature, lr):
    """ConcreteTaskArithmeticAlgorithmForCLIP.train_mask: the logits by parameter.

    losses: of every step, a function of weights; uniforms: of every step numbers in (0, 1) by parameter.
    """
    logits = {key: torch.zeros_like(weight, requires_grad=True) for key, weight in base.items()}
    moments = {key: (torch.zeros_like(weight), torch.zeros_like(weight)) for key, weight in base.items()}
    fixed = torch.full((len(next(iter(taus.values()))), 1), scaling)
    for step, (loss, uniform) in enumerate(zip(losses, uniforms, strict=True), 1):
        value = loss(moved(base, taus, fixed, relaxed(logits, uniform, temperature)))
        gradients = torch.autograd.grad(value, list(logits.values()))
        for (key, leaf), gradient in zip(logits.items(), gradients, strict=True):
            adam(leaf, gradient, moments[key], step, lr)
    return {key: leaf.detach() for key, leaf in logits.items()}


def concrete_adamerging(base, taus, inner, outer, uniforms, init, temperature, lr, base_lr):
    """Concrete{Task,Layer}WiseAdaMergingForCLIP.train_mask, inner and outer being losses as in `concrete`.

    init: [T, 1] or [T, L]. In front of the inner step the weights are merged before the coefficients are put back.
    """
    logits = {key: torch.zeros_like(weight, requires_grad=True) for key, weight in base.items()}
    moments = {key: (torch.zeros_like(weight), torch.zeros_like(weight)) for key, weight in base.items()}
    weight, of_weight = init.clone().requires_grad_(), (torch.zeros_like(init), torch.zeros_like(init))
    for step, (first, second, uniform) in enumerate(zip(inner, outer, uniforms, strict=True), 1):
        masks = relaxed(logits, uniform, temperature)
        value = first(moved(base, taus, weight, {key: mask.detach() for key, mask in masks.items()}))
        (gradient,) = torch.autograd.grad(value, weight)
        weight.data = init.clone()
        adam(weight, gradient, of_weight, step, base_lr)
        value = second(moved(base, taus, weight, masks))
        gradients = torch.autograd.grad(value, list(logits.values()))
        for (key, leaf), gradient in zip(logits.items(), gradients, strict=True):
            adam(leaf, gradient, moments[key], step, lr)
    return {key: leaf.detach() for key, leaf in logits.items()}
