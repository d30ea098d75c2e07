"""Retrieval: gating weights of the labelled samples that are nearest to an input, in place of a trained network."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Neighbours(nn.Module):
    """Features [..., F] -> the mean gating weights [..., G] of the `count` nearest samples, or of all there are.

    Of samples [n, F] and their weights [n, G], by Euclidean distances, or where there is a `metric` L [r, F] by those
    of L x, which is kept of samples. A state dict brings numbers of any n, and the metric.
    """

    def __init__(self, width: int, parts: int, count: int):
        super().__init__()
        self.count = count
        self.register_buffer("samples", torch.empty(0, width))
        self.register_buffer("weights", torch.empty(0, parts))
        self.register_buffer("metric", None)
        self.samples: Tensor
        self.weights: Tensor
        self.metric: Tensor | None

    def keep(self, samples: Tensor, weights: Tensor, metric: Tensor | None = None) -> None:
        """Take samples [n, F] and what each answers [n, G]."""
        self.metric = metric
        self.samples, self.weights = self._seen(samples), weights

    def _seen(self, x: Tensor) -> Tensor:
        """What distances are measured of."""
        return x if self.metric is None else functional.linear(x, self.metric)

    def forward(self, x: Tensor) -> Tensor:
        # without a product of all pairs, whose rounding would follow the size of the batch
        distances = torch.cdist(self._seen(x), self.samples, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.topk(min(self.count, len(self.samples)), -1, largest=False).indices
        return self.weights[nearest].mean(-2)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one input."""
        return self.samples.numel() + (0 if self.metric is None else self.metric.numel())

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for name in ("samples", "weights", "metric"):
            if (stored := state_dict.get(prefix + name)) is not None:
                setattr(self, name, torch.empty_like(stored))
        super()._load_from_state_dict(state_dict, prefix, *rest)
