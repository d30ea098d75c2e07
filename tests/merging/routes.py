"""What the tests of routed towers share: a tiny tower, merges with deltas of all kinds on it, gates that tell apart."""

from dataclasses import replace
from functools import cache

import torch
from torch import nn

from merging.backbones.open_clip import OpenClip
from merging.checkpoints import StateDict
from merging.deltas import Dense, LowRank, Masked, OnDemand, Rows, Tucker
from merging.merged import Merged, Routing
from merging.routing.gates import Gate, GateShape
from merging.routing.install import install

T, BATCH = 3, 6
SHAPE = {"layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "image_size": 16}  # 5 tokens
KINDS = ("Dense", "LowRank", "Tucker", "Masked", "OnDemand")


@cache
def backbone(quick_gelu=False):
    return OpenClip("tiny", 12, SHAPE, quick_gelu)


@cache
def weights(quick_gelu=False):
    """Nothing of it zero or one: a bias or a norm that is left out is seen."""
    rng = torch.Generator().manual_seed(1)
    tower = backbone(quick_gelu).build()
    return {key: 0.3 * torch.randn(each.shape, generator=rng) for key, each in tower.state_dict().items()}


def delta(kind, shape, seed, parts=T, size=0.2):
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *sides: size * torch.randn(sides, generator=rng)  # noqa: E731
    m, n = shape[0], shape[1:].numel()
    if len(shape) == 1 and kind in ("LowRank", "Tucker", "Rows"):
        kind = "Dense"
    if kind == "Rows" and (m % 3 or len(shape) > 2):
        kind = "LowRank"
    if kind == "Rows":
        return Rows([delta(each, torch.Size((m // 3, n)), seed + i, parts) for i, each in enumerate(KINDS[:3])])
    if kind == "LowRank":
        return LowRank.of(draw(parts, m, 2), draw(parts, 2, n) / size, shape)
    if kind == "Tucker":
        return Tucker(draw(2, 3, 4), draw(parts, 2) / size, draw(m, 3) / size, draw(n, 4) / size, shape)
    changes = draw(parts, *shape)
    if kind == "Masked":
        return Masked.of(changes[0], changes > 0, draw(parts) / size)
    return OnDemand(changes.unbind().__getitem__, shape, parts) if kind == "OnDemand" else Dense(changes)


def merge(kinds=KINDS, quick_gelu=False, routes=lambda key: True, parts=T, routing=None):
    """Deltas of all kinds in turn on the parameters that are routed; all parameters get a static change too."""
    base = StateDict(weights(quick_gelu))
    keys = [key for key in base.specs() if routes(key)]
    own = {key: delta(kinds[i % len(kinds)], base.specs()[key].shape, i, parts) for i, key in enumerate(keys)}
    shared = {key: torch.full(spec.shape, 0.01) for key, spec in base.specs().items()}
    return Merged(base, tuple("abcdefgh"[:parts]), base.specs(), shared, own, routing, scale=0.5)


def ffn(key):
    return ".mlp." in key


def images(batch=BATCH, dtype=torch.float32, seed=2):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gates(batch=BATCH, parts=T, seed=3):
    """Any real weights."""
    return torch.randn(batch, parts, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def folded(merged, x, w, quick_gelu=False):
    """open_clip's own tower, filled with W(x) of one sample after the other, in fp64."""
    tower = backbone(quick_gelu).build().double()
    each = []
    for sample, row in zip(x.double(), w, strict=True):
        tower.load_state_dict({key: tensor.double() for key, tensor in merged.state(row)}, strict=True)
        each.append(tower(sample[None]))
    return torch.cat(each)


def close(found, expected, relative=1e-4):
    assert float(((found.double() - expected).norm() / expected.norm()).detach()) < relative


def gated(sees, routes=ffn, kinds=("Tucker", "Dense"), **shape):
    """Gates whose answer depends on the image: random, on standardised features."""
    shape = GateShape(sees=sees, **shape)
    torch.manual_seed(5)
    bare = merge(kinds, routes=routes)
    places = [index for index, block in enumerate(install(backbone().build(), bare).blocks) if block.routed]
    count = len(places) if sees == "block" and not shape.shared else 1
    trained = nn.ModuleList([Gate(24, T, shape).eval() for _ in range(count)])
    merged = replace(bare, routing=Routing("learned", shape.granularity, gate=shape, gates=trained))
    model = install(backbone().build(), merged)

    def fit(gate, tokens):
        gate.standardise(gate.features(tokens))
        for parameter in gate.net.parameters():
            nn.init.normal_(parameter, std=0.5)

    def observer(index, tokens):
        fit(model.gate_of(index), tokens)
        return torch.full((T,), 1 / T)

    with torch.no_grad():
        model.observed(observer, images(16)) if sees == "block" else fit(trained[0], model.seen(images(16)))
    return merged
