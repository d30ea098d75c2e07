"""Models of one size over the same random weights: static, Duet and Twin, installed as any merge is."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from launchers.bench import SIZES, TASKS
from merging import accounting, api
from merging.backbones.open_clip import OpenClip
from merging.checkpoints import StateDict
from merging.deltas import Delta, Dense, LowRank, Rows, Tucker
from merging.merged import Merged, Routing
from merging.routing.gates import Gate, GateShape

GIVEN = Routing("given")  # the caller gives the gating weights
Deltas = Mapping[str, Delta]


class Models:
    """A backbone with random weights, random deltas, images [B, 3, H, W], and gating weights of their own [B, T]."""

    def __init__(self, arch: str, batch: int = 1):
        size, self.tenth = SIZES[arch]["tower"], SIZES[arch]["tenth"]
        self.backbone = OpenClip(arch, SIZES[arch]["features"], size, quick_gelu=True)
        torch.manual_seed(0)
        self.tower: Any = self.backbone.build()
        self.weights = {key: tensor.detach() for key, tensor in self.tower.state_dict().items()}
        self.width, self.blocks = size["width"], size["layers"]
        self.images = torch.randn(batch, 3, size["image_size"], size["image_size"])
        self.w = torch.randn(batch, TASKS).softmax(-1)

    def duet(self, rank: int) -> Deltas:
        """Shared-factor deltas on the FFN matrices, their biases whole."""
        weights = {key: weight for key, weight in self.weights.items() if ".mlp." in key}
        return {key: tucker(weight, rank) if weight.ndim == 2 else Dense(normal(TASKS, *weight.shape, size=0.01))
                for key, weight in weights.items()}  # fmt: skip

    def twin(self, rank: int) -> Deltas:
        """Low-rank deltas on all linear layers of the blocks; query, key and value apart."""
        deltas: dict[str, Delta] = {}
        for key, weight in self.weights.items():
            if "resblocks" in key and weight.ndim == 2:
                m, n = weight.shape
                fused = "in_proj" in key
                deltas[key] = Rows([low_rank(m // 3, n, rank) for _ in range(3)]) if fused else low_rank(m, n, rank)
        return deltas

    def gates(self) -> Routing:
        """A gate in every block."""
        shape = GateShape()
        gates = nn.ModuleList([Gate(self.width, TASKS, shape).eval() for _ in range(self.blocks)])
        return Routing("given", gate=shape, gates=gates)

    def installed(self, deltas: Deltas, routing: Routing = GIVEN) -> Any:
        """The routed model."""
        return api.install(self.tower, self._merged(deltas, routing))

    def macs(self, deltas: Deltas, routing: Routing = GIVEN) -> int:
        """Multiply-accumulates of one sample, from the accountant."""
        return accounting.macs(self._merged(deltas, routing), self.backbone)

    def _merged(self, deltas: Deltas, routing: Routing) -> Merged:
        base, tasks = StateDict(self.weights), tuple(map(str, range(TASKS)))
        return Merged(base, tasks, base.specs(), deltas=deltas, routing=routing)


def tucker(weight: Tensor, rank: int) -> Tucker:
    m, n = weight.shape
    core, task = normal(TASKS, rank, rank, size=1 / rank), normal(TASKS, TASKS, size=0.3)
    return Tucker(core, task, normal(m, rank, size=m**-0.5), normal(n, rank, size=n**-0.5))


def low_rank(m: int, n: int, rank: int) -> LowRank:
    return LowRank(normal(m, TASKS * rank, size=0.1 * rank**-0.5), normal(TASKS * rank, n, size=n**-0.5), TASKS)


def normal(*shape: int, size: float) -> Tensor:
    return torch.randn(shape) * size
