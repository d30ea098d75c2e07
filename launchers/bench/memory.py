"""How many bytes of tensors a computation makes: alive at once, or kept for a backward pass."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of tensors made inside that are alive at once; what exists before, such as weights, is not."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()  # storages that exist

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._known |= {key_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and key_of(tensor) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(key_of(tensor))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._drop, key_of(tensor), storage.nbytes())
        return result

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def key_of(tensor: Tensor) -> int:
    """The storage under a tensor."""
    return tensor.untyped_storage()._cdata


def peak(run: Callable[[], object], device: str) -> int:
    """Most bytes that the tensors made by `run` take at once; on CUDA as its allocator counts them."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Live() as live:
        run()
    return live.peak


def saved(run: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes of the tensors that autograd keeps while `run` computes something to differentiate, `weights` left out."""
    ignored = {key_of(weight) for weight in weights}
    kept: dict[int, Tensor] = {}  # held, so that no storage is freed and its key used again

    def pack(tensor: Tensor) -> Tensor:
        if key_of(tensor) not in ignored:
            kept[key_of(tensor)] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
