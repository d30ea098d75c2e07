"""Models of one size over the same random weights: static, Duet and Twin, installed as any merge is."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merging.deltas import Delta
    from merging.merged import Merged, Routing

TASKS = 8
SIZES = {  # image, patch, width, blocks, features, rank that keeps a tenth of the singular values of a square matrix
    "b32": (224, 32, 768, 12, 512, 76),
    "l14": (224, 14, 1024, 24, 768, 102),
    "tiny": (32, 8, 64, 2, 32, 6),
}


class Models:
    """A backbone with random weights, and random deltas for it; in fp32 on the CPU, until `installed`."""

    def __init__(self, arch: str):
        import torch

        from merging.backbones.open_clip import OpenClip

        image, patch, width, layers, features, self.tenth = SIZES[arch]
        facts = {"image_size": image, "patch_size": patch, "width": width, "layers": layers, "head_width": 64}
        self.backbone = OpenClip(arch, features, facts, quick_gelu=True)
        with torch.device("meta"):
            _ = self.backbone.macs  # is kept; counted on no memory
        torch.manual_seed(0)
        self.tower: Any = self.backbone.build()
        self.weights = {key: tensor.detach() for key, tensor in self.tower.state_dict().items()}
        self.width, self.blocks, self.image = width, layers, image

    def inputs(self, batch: int, **like: Any) -> "tuple[Tensor, Tensor]":
        """Images [B, 3, H, W], and gating weights of its own for every image [B, T]."""
        import torch

        random = torch.Generator().manual_seed(1)
        images = torch.randn(batch, 3, self.image, self.image, generator=random).to(**like)
        return images, torch.randn(batch, TASKS, generator=random).softmax(-1).to(**like)

    def duet(self, rank: int) -> "dict[str, Delta]":
        """Shared-factor deltas on the FFN matrices, their biases whole."""
        from merging.deltas import Delta, Dense, Tucker

        deltas: dict[str, Delta] = {}
        for key, weight in self.weights.items():
            if ".mlp." in key and weight.ndim == 2:
                (m, n), task = weight.shape, normal(TASKS, TASKS, size=0.3)
                core, out = normal(TASKS, rank, rank, size=1 / rank), normal(m, rank, size=m**-0.5)
                deltas[key] = Tucker(core, task, out, normal(n, rank, size=n**-0.5))
            elif ".mlp." in key:
                deltas[key] = Dense(normal(TASKS, *weight.shape, size=0.01))
        return deltas

    def twin(self, rank: int) -> "dict[str, Delta]":
        """Low-rank deltas on all linear layers of the blocks; query, key and value apart."""
        from merging.deltas import Delta, LowRank, Rows

        def low_rank(m: int, n: int) -> Delta:
            down = normal(TASKS * rank, n, size=n**-0.5)
            return LowRank(normal(m, TASKS * rank, size=0.1 * rank**-0.5), down, TASKS)

        deltas: dict[str, Delta] = {}
        for key, weight in self.weights.items():
            if "resblocks" in key and weight.ndim == 2:
                m, n = weight.shape
                deltas[key] = Rows([low_rank(m // 3, n) for _ in range(3)]) if "in_proj" in key else low_rank(m, n)
        return deltas

    def merged(self, deltas: "Mapping[str, Delta]", routing: "Routing | None" = None) -> "Merged":
        """The merge with these deltas; without a routing the caller gives the gating weights."""
        from merging.checkpoints import StateDict
        from merging.merged import Merged, Routing

        base, tasks = StateDict(self.weights), tuple(map(str, range(TASKS)))
        return Merged(base, tasks, base.specs(), deltas=deltas, routing=routing or Routing("given"))

    def installed(self, deltas: "Mapping[str, Delta]", routing: "Routing | None" = None, **like: Any) -> "nn.Module":
        """The routed model on a device, in a dtype."""
        from merging.api import install

        return install(self.tower, self.merged(deltas, routing)).to(**like)

    def macs(self, deltas: "Mapping[str, Delta]", routing: "Routing | None" = None) -> int:
        """Multiply-accumulates of one sample, from the accountant."""
        from merging.accounting import macs

        return macs(self.merged(deltas, routing), self.backbone)

    def gates(self) -> "Routing":
        """A gate in every block."""
        from torch import nn

        from merging.merged import Routing
        from merging.routing.gates import Gate, GateShape

        shape = GateShape()
        gates = nn.ModuleList([Gate(self.width, TASKS, shape).eval() for _ in range(self.blocks)])
        return Routing("given", gate=shape, gates=gates)


def normal(*shape: int, size: float = 1.0) -> "Tensor":
    import torch

    return torch.randn(shape) * size
