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


def frank_wolfe_hard(start, checkpoints, losses, step_size, scaling, layerwise):
    """FrankWolfeHardAlgorithm.run with merge_fn task_arithmetic: the weights by parameter.

    checkpoints: the experts' weights; losses: of every iteration, a function of weights.
    """
    theta = {key: weight.clone() for key, weight in start.items()}
    pool = [*checkpoints, start]
    for iteration, loss in enumerate(losses):
        leaves = {key: weight.clone().requires_grad_() for key, weight in theta.items()}
        gradients = dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))
        cosines = [{key: float((gradients[key] * model[key]).sum() / (gradients[key].norm() * model[key].norm()))
                    for key in theta} for model in pool]  # fmt: skip
        if layerwise:
            chosen = {key: min(range(len(pool)), key=lambda index: cosines[index][key]) for key in theta}
        else:
            chosen = dict.fromkeys(theta, min(range(len(pool)), key=lambda index: sum(cosines[index].values())))
        step = 2 / (iteration + 2) * step_size
        for key, index in chosen.items():
            theta[key] = theta[key] + step * scaling * (pool[index][key] - theta[key])
    return theta


def frank_wolfe_soft(start, checkpoints, rounds, first, later, lr):
    """FrankWolfeSoftAlgorithm.run with merge_fn adamerging and as many checkpoints as tasks, all of which it takes.

    rounds: for each the losses of its steps, functions of weights.
    """
    theta = {key: weight.clone() for key, weight in start.items()}
    for number, losses in enumerate(rounds):
        values = torch.full((len(checkpoints), len(theta)), later if number else first, requires_grad=True)
        moments = torch.zeros_like(values), torch.zeros_like(values)

        def merged(values, theta=theta):
            return {key: weight + sum(values[m, layer] * (checkpoint[key] - weight)
                                      for m, checkpoint in enumerate(checkpoints))
                    for layer, (key, weight) in enumerate(theta.items())}  # fmt: skip

        for step, loss in enumerate(losses, 1):
            (gradient,) = torch.autograd.grad(loss(merged(values)), values)
            adam(values, gradient, moments, step, lr)
        theta = merged(values.detach())
    return theta


def self_positioning(base, taus, losses, penalty, lr, length):
    """The fold of SLERPs of unnormalised vectors and SGD on its shares and length, on flat vectors.

    taus: [T, n] in order; losses: of every step, a function of flat weights [n].
    """
    shares = torch.ones(len(taus), dtype=torch.float64, requires_grad=True)
    length = torch.tensor(float(length), dtype=torch.float64, requires_grad=True)

    def position():
        vector = taus[0]
        for k in range(1, len(taus)):
            before = sum(shares[:k]) / k
            angle = torch.acos(vector @ taus[k] / vector.norm() / taus[k].norm())
            own, other = shares[k] / (before + shares[k]), before / (before + shares[k])
            vector = (torch.sin(other * angle) * vector + torch.sin(own * angle) * taus[k]) / torch.sin(angle)
        return length * vector

    for loss in losses:
        value = loss(base + position()) + penalty * length
        gradients = torch.autograd.grad(value, (shares, length))
        for leaf, gradient in zip((shares, length), gradients, strict=True):
            leaf.data -= lr * gradient
    return position().detach()
