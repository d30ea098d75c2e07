"""How alike the changes of the experts are: cosines between their task vectors."""

import torch
from torch import Tensor

from merging.cache import code, key_of
from merging.experts import Experts

CODE = ("merging.similarity",)
CHUNK = 1 << 20  # entries of each task vector that are widened to fp64 at a time


def cosines(experts: Experts) -> Tensor:
    """Cosine between task vectors over all parameters in view, [T, T] fp64; symmetric, the diagonal is 1.

    Of a task vector of zeros, which points nowhere, all are 0. One parameter of all experts is in memory at a time;
    products of fp32 are exact in fp64, so only their sum is rounded. Computed once per set of experts, whatever their
    order. Raises UserError on NaN or Inf, naming the parameter.
    """
    if experts.cache is None or experts.sparsifiers:
        products = _products(experts)
    else:
        ids = [expert.id for expert in experts.checkpoints]
        order = torch.tensor(sorted(range(len(ids)), key=ids.__getitem__))
        key = key_of("similarity", code(CODE), experts.origin.id, sorted(ids), experts.keys())
        stored = experts.cache.tensors(key, lambda: {"products": _products(experts)[order][:, order]})["products"]
        products = stored[order.argsort()][:, order.argsort()]
    lengths = products.diagonal().sqrt()
    cosine = (products / torch.outer(lengths, lengths)).nan_to_num(0).clamp(-1, 1)
    return ((cosine + cosine.T) / 2).fill_diagonal_(0) + torch.diag((lengths > 0).double())


def _products(experts: Experts) -> Tensor:
    """Inner products of the task vectors, [T, T] fp64."""
    count = len(experts.tasks)
    total = torch.zeros(count, count, dtype=torch.float64)
    for _, tau in experts.stream():
        for chunk in map(Tensor.double, tau.reshape(count, -1).split(CHUNK, dim=1)):
            total += chunk @ chunk.T
    return total
