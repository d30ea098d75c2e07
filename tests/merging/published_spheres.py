"""mergekit's model_stock, slerp, karcher and multislerp, written down step by step in fp64 for flat vectors [n]."""

import itertools
import math

import torch
from torch import dot
from torch.linalg import norm


def model_stock(base, experts):
    pairs = list(itertools.combinations([expert - base for expert in experts], 2))
    cosine = sum(max(-1.0, min(1.0, float(dot(a, b) / (norm(a) * norm(b)).clamp(min=1e-6)))) for a, b in pairs)
    cosine /= len(pairs)
    t = len(experts) * cosine / (1 + (len(experts) - 1) * cosine)
    return t * sum(experts) / len(experts) + (1 - t) * base


def slerp(share, first, second):
    cosine = float(dot(first / norm(first), second / norm(second)))
    if abs(cosine) > 0.9995:
        return (1 - share) * first + share * second
    angle = math.acos(cosine)
    return (math.sin((1 - share) * angle) * first + math.sin(share * angle) * second) / math.sin(angle)


def karcher(vectors, iterations, close=1e-5):
    lengths = [float(norm(vector)) for vector in vectors]
    units = [vector / length for vector, length in zip(vectors, lengths, strict=True) if length > close]
    mean = sum(units) / len(units)
    mean = mean / norm(mean)
    for _ in range(iterations):
        tangent = torch.zeros_like(mean)
        for unit in units:
            cosine = max(-1.0, min(1.0, float(dot(mean, unit))))
            angle = math.acos(cosine)
            if angle >= close:
                tangent += angle / math.sin(angle) * (unit - cosine * mean) / len(units)
        size = float(norm(tangent))
        if size < close:
            break
        mean = math.cos(size) * mean + math.sin(size) * tangent / size
        mean = mean / norm(mean)
    return sum(lengths) / len(lengths) * mean


def multi_slerp(vectors):
    lengths = torch.stack([norm(vector) for vector in vectors])
    units = [vector / length for vector, length in zip(vectors, lengths, strict=True)]
    mean = sum(units) / len(units)
    mean = mean / norm(mean)
    tangent = sum(unit - dot(unit, mean) * mean for unit in units) / len(units)
    size = norm(tangent) + 1e-8
    return (mean * torch.cos(size) + tangent * torch.sin(size) / size) * lengths.mean()
