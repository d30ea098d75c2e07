"""Retrieval: gating weights of the labelled samples that are nearest to an input, in place of a trained network."""

import torch
from torch import Tensor, nn


class Neighbours(nn.Module):
    """Features [..., F] -> the mean gating weights [..., G] of the `count` nearest samples, or of all there are.

    Of samples [n, F] and their weights [n, G], by Euclidean distances. A state dict brings numbers of any n.
    """

    def __init__(self, width: int, parts: int, count: int):
        super().__init__()
        self.count = count
        self.register_buffer("samples", torch.empty(0, width))
        self.register_buffer("weights", torch.empty(0, parts))
        self.samples: Tensor
        self.weights: Tensor

    def keep(self, samples: Tensor, weights: Tensor) -> None:
        """Take samples [n, F] and what each answers [n, G]."""
        self.samples, self.weights = samples, weights

    def forward(self, x: Tensor) -> Tensor:
        # without a product of all pairs, whose rounding would follow the size of the batch
        distances = torch.cdist(x, self.samples, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.topk(min(self.count, len(self.samples)), -1, largest=False).indices
        return self.weights[nearest].mean(-2)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one input."""
        return self.samples.numel()

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for name in ("samples", "weights"):
            if (stored := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(stored))
        super()._load_from_state_dict(state_dict, prefix, *rest)
