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
