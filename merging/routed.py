"""A merge inside a backbone: W(x) = W_s + sum_t w_t(x) delta_t for every sample, without building W(x)."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from merging.backbones.open_clip import PREFIX, ImageTower
from merging.deltas import Delta, LowRank, OnDemand, Rows, rebuild
from merging.errors import UserError
from merging.layers import RoutedLinear, RoutedNorm, RoutedParameter, Split, apart, clustered
from merging.merged import Merged, Routing
from merging.routing.gates import Gate, Subspace

KERNELS = ("auto", "factored", "grouped", "folded", "materialised")


class Block(nn.Module):
    """A pre-norm transformer block. Its own gate, if any, sees what enters its first routed half."""

    def __init__(self, block: nn.Module, heads: int, part: Callable[[str], Any]):
        super().__init__()
        self.heads, self.act = heads, cast(nn.Module, block.mlp.gelu)  # type: ignore[union-attr]
        self.ln_1, self.ln_2 = part("ln_1"), part("ln_2")
        self.attn: RoutedLinear | Split = part("attn.in_proj_")
        self.out: RoutedLinear = part("attn.out_proj.")
        self.c_fc, self.c_proj = part("mlp.c_fc."), part("mlp.c_proj.")
        self.gate: Gate | None = None
        self.kernel = "auto"

    @property
    def routed(self) -> bool:
        return self.routed_attention or any(each.routed for each in (self.ln_2, self.c_fc, self.c_proj))

    @property
    def routed_attention(self) -> bool:
        return any(each.routed for each in (self.ln_1, self.attn, self.out))

    def forward(self, x: Tensor, w: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, N, d] and the weights that were used for them last."""
        if self.gate is None:
            x = x + self.attention(self.ln_1(x, w), w)
            return x + self.ffn(self.ln_2(x, w), w), w
        x, hidden = self.ask(x)
        return self.answer(x, hidden, self.gate(hidden))

    def ask(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From the block's input: the tokens so far, and what the block's gate sees."""
        hidden = self.ln_1(x)
        if self.routed_attention:
            return x, hidden
        x = x + self.attention(hidden, None)
        return x, self.ln_2(x)

    def answer(self, x: Tensor, hidden: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of the block after `ask`, by the gate's weights."""
        if self.routed_attention:
            x = x + self.attention(self.ln_1(x, w) if self.ln_1.routed else hidden, w)
            hidden = self.ln_2(x, w)
        elif self.ln_2.routed:
            hidden = self.ln_2(x, w)
        return x + clustered(self.ffn, hidden, w, self.kernel), w

    def attention(self, x: Tensor, w: Tensor | None) -> Tensor:
        q, k, v = self.attn(x, w).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), w)

    def ffn(self, x: Tensor, w: Tensor | None) -> Tensor:
        return self.c_proj(self.act(self.c_fc(x, w)), w)


class RoutedTower(nn.Module):
    """An open_clip vision transformer whose weights follow the input: images [B, 3, H, W] -> features [B, D].

    The weights of a gate come from the blocks' own gates, or from one gate for the whole model that sees the tokens
    before the first routed block (`early`) or the last tokens of a static pass (`pass`); or the caller gives them.
    """

    def __init__(self, tower: ImageTower, weights: Mapping[str, Tensor], own: Mapping[str, Delta]):
        super().__init__()
        visual = tower.visual
        check_tower(visual)

        def part(name: str) -> nn.Module:
            if ".ln_" not in f".{name}":
                keys = (f"{PREFIX}{name}weight", f"{PREFIX}{name}bias")
                return RoutedLinear(weights[keys[0]], weights.get(keys[1]), *(own.get(key) for key in keys))
            keys = (f"{PREFIX}{name}.weight", f"{PREFIX}{name}.bias")
            layer = visual.get_submodule(name)
            return RoutedNorm(layer, *(weights[key] for key in keys), *(own.get(key) for key in keys))  # type: ignore[arg-type]

        def single(name: str) -> RoutedParameter:
            return RoutedParameter(weights[PREFIX + name], own.get(PREFIX + name))

        conv, delta = weights[f"{PREFIX}conv1.weight"], own.get(f"{PREFIX}conv1.weight")
        self.patch, self.conv1 = conv.shape[-1], RoutedLinear(conv.flatten(1), None, delta)
        self.class_embedding, self.positions = single("class_embedding"), single("positional_embedding")
        self.ln_pre, self.ln_post = part("ln_pre"), part("ln_post")
        blocks = enumerate(visual.transformer.resblocks)  # type: ignore[union-attr, arg-type]
        self.blocks = nn.ModuleList(
            Block(block, block.attn.num_heads, lambda name, i=i: part(f"transformer.resblocks.{i}.{name}"))
            for i, block in blocks
        )
        projection = own.get(f"{PREFIX}proj")
        self.proj = RoutedLinear(
            weights[f"{PREFIX}proj"].T, None, None if projection is None else projection.transposed()
        )
        self.parts = next((delta.parts for delta in own.values()), None)
        self.gate: Gate | None = None
        self.sees = "given"
        self.kernel = "auto"

    @property
    def steps(self) -> list[Block]:
        """The blocks in order."""
        return cast(list[Block], list(self.blocks))

    @property
    def stem(self) -> tuple[nn.Module, ...]:
        return self.conv1, self.class_embedding, self.positions, self.ln_pre

    @property
    def first_routed(self) -> int:
        """Index of the first block that is routed; -1 if something before the blocks is."""
        if any(each.routed for each in self.stem):
            return -1
        return next((i for i, block in enumerate(self.steps) if block.routed), len(self.blocks))

    def use(self, kernel: str) -> "RoutedTower":
        """Choose how mixed weights are applied; the kernels agree up to rounding.

        auto: factored, but samples with the same weights are grouped. factored: never builds a mixed matrix. grouped:
        clusters of equal weights. folded: as grouped, always through dense weights. materialised: a dense matrix per
        sample (for comparison). Raises UserError for another name.
        """
        if kernel not in KERNELS:
            raise UserError(f"kernel={kernel!r} is unknown. Choose one of {', '.join(KERNELS)}.")
        for module in self.modules():
            if isinstance(module, (RoutedLinear, Block, RoutedTower)):
                module.kernel = kernel
        return self

    def forward(self, images: Tensor, w: Tensor | None = None) -> Tensor:
        """`w` [G] or [B, G] overrules the gates. Raises UserError for a w of another shape and for a missing one."""
        if w is not None:
            self._check(w, len(images))
        elif self.sees == "given" and self.parts is not None:
            self.asked(images)
        if w is None and self.sees == "pass":
            w = self.asked(self.run(self.embed(images))[0])
        if w is not None:
            return clustered(self._whole, images, w, self.kernel)
        x = self.embed(images)
        if self.sees == "early":
            x = self.prefix(x)
            return clustered(self._rest, x, self.asked(x), self.kernel)
        return self.head(*self.run(x))

    def embed(self, images: Tensor, w: Tensor | None = None) -> Tensor:
        """Tokens [B, N, d] before the blocks."""
        size, (rows, columns) = self.patch, (side // self.patch for side in images.shape[-2:])
        images = images[..., : rows * size, : columns * size]  # as a convolution leaves an incomplete patch out
        patches = images.unflatten(-1, (columns, size)).unflatten(-3, (rows, size)).permute(0, 2, 4, 1, 3, 5)
        tokens = self.conv1(patches.flatten(3).flatten(1, 2), w)
        first = self.class_embedding(w).to(tokens.dtype).expand(len(tokens), -1)[:, None]
        return self.ln_pre(torch.cat([first, tokens], 1) + self.positions(w).to(tokens.dtype), w)

    def run(self, x: Tensor, w: Tensor | None = None, first: int = 0) -> tuple[Tensor, Tensor | None]:
        """Tokens through the blocks from `first` on, and the weights of the last one that had any."""
        used = w
        for block in self.steps[first:]:
            x, asked = block(x, w)
            used = used if asked is None else asked
        return x, used

    def prefix(self, x: Tensor) -> Tensor:
        """Through the blocks before the first routed one."""
        for block in self.steps[: self.first_routed]:
            x, _ = block(x)
        return x

    def head(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        """Features [B, D] of tokens [B, N, d]."""
        w = w if w is None or w.ndim < 3 else w[:, 0]
        return self.proj(self.ln_post(x[:, :1], w), w)[:, 0]

    def weights(self, images: Tensor) -> Tensor:
        """What the model's one gate answers for images, [B, G] (early and pass)."""
        return self.asked(self.seen(images))

    def seen(self, images: Tensor) -> Tensor:
        """The tokens [B, N, d] that the model's one gate is shown (early and pass)."""
        x = self.embed(images)
        return self.run(x)[0] if self.sees == "pass" else self.prefix(x)

    def asked(self, hidden: Tensor) -> Tensor:
        """The weights that the model's one gate gives for tokens."""
        if self.gate is None:
            raise UserError("This model has no gate: give the weights of its parts, model(images, w).")
        return self.gate(hidden)

    def _check(self, w: Tensor, samples: int) -> None:
        parts = w.shape[-1] if self.parts is None else self.parts
        if w.ndim not in (1, 2) or w.shape[-1] != parts or (w.ndim == 2 and len(w) != samples):
            raise UserError(
                f"w has shape {tuple(w.shape)}, but this model mixes {parts} parts for {samples} images: give "
                f"[{parts}], the same for all, or [{samples}, {parts}]."
            )

    def _whole(self, images: Tensor, w: Tensor) -> Tensor:
        return self.head(self.run(self.embed(images, w), w)[0], w)

    def _rest(self, x: Tensor, w: Tensor) -> Tensor:
        return self.head(self.run(x, w, self.first_routed)[0], w)


def check_tower(visual: nn.Module) -> None:
    """Raises UserError unless the tower is a plain ViT: class token, ln_pre, fused attention, no LayerScale."""
    plain = getattr(visual, "pool_type", None) == "tok" and getattr(visual, "attn_pool", None) is None
    plain = plain and isinstance(getattr(visual, "ln_pre", None), nn.LayerNorm) and visual.proj is not None
    if not plain:
        raise UserError(
            f"Routing is written for CLIP's vision transformers (class token, ln_pre, projection); "
            f"{type(visual).__name__} with these settings is not one."
        )


def install(tower: ImageTower, merged: Merged) -> RoutedTower:
    """The tower with the merge inside, gates included. Raises UserError for a delta that fits no parameter or gate."""
    weights = {key: merged.static(key) for key in merged.specs}
    for key, delta in merged.deltas.items():
        if key not in weights or delta.shape != weights[key].shape:
            have = tuple(weights[key].shape) if key in weights else "not there"
            raise UserError(f"The delta of {key} is for shape {tuple(delta.shape)}, the parameter is {have}.")
        if delta.parts != merged.parts:
            raise UserError(f"The delta of {key} mixes {delta.parts} parts, the gate gives {merged.parts} weights.")
    # modules of its own over the same tensors: moving the tower leaves the merge where it is
    own = {
        key: delta if isinstance(delta, OnDemand) else rebuild(delta.facts(), dict(delta.named_buffers()))
        for key, delta in merged.deltas.items()
    }
    routed = RoutedTower(tower, weights, own)
    if merged.routing is not None:
        attach(routed, merged.routing)
    return routed.eval()


def attach(tower: RoutedTower, routing: Routing) -> None:
    """Give the tower the gates of a routing; one without trained gates leaves it to be called with weights."""
    if routing.router == "subspace":
        attach_subspaces(tower, routing)
    if routing.gate is None or routing.gates is None:
        return
    tower.sees = routing.gate.sees
    if tower.sees == "block":
        routed = [block for block in tower.steps if block.routed]
        for index, block in enumerate(routed):
            block.gate = routing.gates[0 if routing.gate.shared else index]  # type: ignore[assignment]
    else:
        tower.gate = routing.gates[0]  # type: ignore[assignment]


def attach_subspaces(tower: RoutedTower, routing: Routing) -> None:
    """SMILE: every routed linear layer gets a gate from the leading directions of its own delta."""
    tower.sees = "linear"
    for block in tower.steps:
        if isinstance(block.attn, RoutedLinear) and isinstance(block.attn.own, Rows):
            block.attn = Split(apart(block.attn))
    for layer in tower.modules():
        if isinstance(layer, RoutedLinear) and isinstance(layer.own, LowRank):
            directions = layer.own.down.unflatten(0, (layer.own.parts, -1))[:, : routing.gate_rank]
            layer.subspace = Subspace(directions, routing.top_k or layer.own.parts)
