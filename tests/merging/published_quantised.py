"""GPTQ and E-PMQ written down step by step, sharing no code with merging/; numbers in fp64."""

import torch
from published_regression import layer_inputs, loaded, rows, stem
from torch import nn


def grid(weights, bits, symmetric):
    """Step and code of 0 of one group of a row, a list of numbers."""
    low, high, last = min([0.0, *weights]), max([0.0, *weights]), 2**bits - 1
    step = max(-low, high) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / last
    step = float(torch.tensor(step).bfloat16()) or 1.0
    return step, 2 ** (bits - 1) if symmetric else min(max(round(-low / step), 0), last)


def rounded(value, step, zero, bits):
    return (min(max(round(value / step) + zero, 0), 2**bits - 1) - zero) * step


def nearest(weight, bits, group, symmetric):
    result = torch.zeros_like(weight)
    for i, row in enumerate(weight.tolist()):
        for start in range(0, len(row), group):
            step, zero = grid(row[start : start + group], bits, symmetric)
            for j, value in enumerate(row[start : start + group], start):
                result[i, j] = rounded(value, step, zero, bits)
    return result


def gptq(weight, hessian, damp, bits, group, symmetric):
    """Optimal brain surgery in the order of columns: the inverse Hessian of those that are left, anew for each."""
    left = weight.clone().double()
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        if column % group == 0:
            grids = [grid(row[column : column + group].tolist(), bits, symmetric) for row in left]
        for row, (step, zero) in zip(left, grids, strict=True):
            value = rounded(float(row[column]), step, zero, bits)
            row[column:] -= (row[column] - value) / inverse[0, 0] * inverse[:, 0]
            row[column] = value
    return left


def e_pmq(build, start, experts, images, ridge, damp, bits, group, symmetric):
    """The model `start`, block by block, every linear layer by what it is given in the model quantised so far."""
    merged = {key: tensor.clone().double() for key, tensor in start.items()}
    model = loaded(build, start)
    hidden = [stem(model, x) for x in images]
    for index, layer in enumerate(model.encoder.layers):
        prefix = f"encoder.layers.{index}."
        seen = [layer_inputs(model, index, x)[0] for x in hidden]
        for name, module in layer.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            key = f"{prefix}{name}.weight"
            left = torch.zeros(module.in_features, module.in_features).double()
            right = torch.zeros(module.in_features, module.out_features).double()
            for inputs, expert in zip(seen, experts, strict=True):
                x = rows(inputs[name])
                gram = x.T @ x / (x.T @ x).norm()
                left, right = left + gram, right + gram @ expert[key].double().T
            left = left + ridge * torch.eye(len(left)).double()
            target = torch.linalg.solve(left, right + ridge * start[key].double().T).T
            merged[key] = gptq(target, left, damp, bits, group, symmetric)
        layer.load_state_dict({k.removeprefix(prefix): v.float() for k, v in merged.items() if k.startswith(prefix)})
        hidden = [layer_inputs(model, index, x)[1] for x in hidden]
    return merged
