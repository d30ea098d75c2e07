"""Small experts with FFNs, and DuetMerging step by step."""

from dataclasses import dataclass, field

import torch
from samples import BACKBONE, drawn, family, tower

from merging.decompose.ranks import Ranks
from merging.neurons import Neurons

TASKS, WIDE, NARROW = 3, 12, 5  # T n > m: the full out rank of the first layer is 12, not 5
SHAPES = {
    "conv1.weight": (NARROW, 3, 2, 2),
    "proj": (NARROW, 4),
    "ln_post.weight": (NARROW,),
    **{
        f"transformer.resblocks.{block}.{name}": shape
        for block in (0, 1)
        for name, shape in {
            "attn.in_proj_weight": (3 * NARROW, NARROW),
            "attn.in_proj_bias": (3 * NARROW,),
            "ln_2.weight": (NARROW,),
            "mlp.c_fc.weight": (WIDE, NARROW),
            "mlp.c_fc.bias": (WIDE,),
            "mlp.c_proj.weight": (NARROW, WIDE),
            "mlp.c_proj.bias": (NARROW,),
        }.items()
    },
}
FFN = [key for key in SHAPES if "mlp" in key]
MATRICES = [key for key in FFN if key.endswith("weight")]
EXACT = Ranks("energy", 0.0)
SMALL = Ranks("fraction", 0.6)
BLOCKS = ("transformer.resblocks.0", "transformer.resblocks.1")
MASKS = {name: drawn(TASKS, WIDE, seed=90 + block) > 0.3 for block, name in enumerate(BLOCKS)}
ATOL = 2e-6  # of weights below 8 through fp32 factors: a few spacings of 2^-21
W = torch.tensor([0.7, -1.3, 2.1])  # neither positive nor summing to one


@dataclass(frozen=True)
class Given(Neurons):
    """Masks by hand."""

    given: dict = field(default_factory=lambda: MASKS)

    def masks(self, experts, context):
        return self.given


GIVEN = Given()


def close(first, second, atol=ATOL):
    return torch.allclose(first.double(), second.double(), rtol=0, atol=atol)


def approximations(merged, key):
    """X' [T, m, n] as inference uses it."""
    return merged.deltas[key].mix(torch.eye(merged.parts))


def published(tau, ranks, mask, down, scale, average, w):
    """Changes of one FFN matrix for weights w, step by step in fp64, with bases from HOSVD."""
    bases = [torch.linalg.svd(tau.movedim(k, 0).flatten(1), full_matrices=False)[0][:, :r] for k, r in enumerate(ranks)]
    core = torch.einsum("tmn,ta,mb,nc->abc", tau, *bases)
    approximate = torch.einsum("abc,ta,mb,nc->tmn", core, *bases)
    total, keepers = torch.zeros_like(tau[0]), torch.zeros_like(tau[0])
    for task in range(len(tau)):
        whole = tau[task] - approximate[task]
        keep = torch.zeros_like(whole)
        (keep.T if down else keep)[mask[task]] = 1
        left, share = whole * keep, float(mask[task].double().mean())
        factor = {"inverse_density": 1 / share, "density": share, "none": 1.0, "energy": whole.norm() / left.norm()}
        total += left * (1.0 if average == "kept" else factor[scale])
        keepers += keep
    static = total / len(tau) if average == "all" else total / keepers.clamp_min(1)
    dynamic = bases[1] @ torch.einsum("j,jbc->bc", bases[0].T @ w, core) @ bases[2].T
    return dynamic, static


def small_towers(tasks=TASKS):
    """Experts of the tiny tower with weights as small as trained ones."""
    return family(tasks, tower(), spread=0.05, size=0.2)


def filled(state):
    """The plain tower with these weights."""
    plain = BACKBONE.build()
    plain.load_state_dict(state)
    return plain.requires_grad_(False)
