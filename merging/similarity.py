"""How alike the changes of the experts are: cosines between their task vectors."""

import torch
from torch import Tensor

from merging.cache import code, key_of
from merging.experts import Experts

CODE = ("merging.similarity",)
CHUNK = 1 << 20  # entries of each task vector that are widened to fp64 at a time


def cosines(experts: Experts) -> Tensor:
    """Cosine between task vectors over all parameters in view, [T, T] fp64; symmetric, the diagonal is 1.

    A task vector of zeros points nowhere: its whole line is 0, its own place on the diagonal too. One parameter of all
    experts is in memory at a time; products of fp32 are exact in fp64, so only their sum is rounded. Computed once per
    set of experts, whatever their order. Raises UserError on NaN or Inf, naming the parameter.
    """
    if experts.cache is None or experts.sparsifier is not None:
        return _normalised(_products(experts))
    ids = [expert.id for expert in experts.checkpoints]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    key = key_of("similarity", code(CODE), experts.origin.id, sorted(ids), experts.keys())
    ranked = torch.tensor(order)

    def make() -> dict[str, Tensor]:
        return {"products": _products(experts)[ranked][:, ranked]}

    places = ranked.argsort()
    return _normalised(experts.cache.tensors(key, make)["products"][places][:, places])


def _products(experts: Experts) -> Tensor:
    """Inner products of the task vectors, [T, T] fp64."""
    count = len(experts.tasks)
    total = torch.zeros(count, count, dtype=torch.float64)
    for _, tau in experts.stream():
        for part in tau.reshape(count, -1).split(CHUNK, dim=1):
            wide = part.double()
            total += wide @ wide.T
    return total


def _normalised(products: Tensor) -> Tensor:
    length = products.diagonal().sqrt()
    moved = length > 0
    ways = torch.where(moved, 1 / length.where(moved, torch.ones(())), torch.zeros(()))
    found = (products * ways[:, None] * ways).clamp(-1, 1)
    found = (found + found.T) / 2
    return found.fill_diagonal_(0) + torch.diag(moved.double())
