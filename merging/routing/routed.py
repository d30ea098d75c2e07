"""A module with a merge inside, and where its gates sit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from merging.errors import UserError
from merging.routing.foreign import Substituted
from merging.routing.gates import Gate, GateShape, Sees
from merging.routing.leaves import Linear
from merging.routing.mixing import Holder, PerThread, clustered, continued, first_tensor

KERNELS = ("auto", "factored", "grouped", "folded", "materialised")
NO_GATE = "This model has no gate: give the gating weights, model(inputs, w=w)."
CACHES = ("past_key_values", "cache")
Observer = Callable[[int, Tensor], Tensor]


class Reached(Exception):
    """Ends a forward at the tokens that were asked for, its one argument."""


def reached(forward: Callable[[], object], block: int) -> Tensor:
    """What a forward raises Reached with. Raises UserError where it ends without."""
    try:
        forward()
    except Reached as end:
        return end.args[0]
    raise UserError(f"The model's forward did not pass block {block}, where its tokens are looked at.")


class State(PerThread):
    """What the forward that runs in this thread is for."""

    asks = False  # whether gates answer
    generates = False
    stop: tuple[str, int] | None = None  # ("enter" | "leave", block) at which it ends
    mask: Tensor | None = None  # [B, N], 0 where a token is padding
    observer: Observer | None = None  # answers in place of the gates


@dataclass
class Block:
    """A repeated block of the module, and those of its direct parts that hold something routed, in no order."""

    name: str
    module: nn.Module
    parts: list[nn.Module] = field(default_factory=list)
    holder: Holder = field(default_factory=Holder)

    @property
    def routed(self) -> bool:
        return bool(self.parts)


class Routed(nn.Module):
    """A module whose weights follow the input: it takes and returns what the module does.

    The gating weights come from gates in the blocks ("block"), which see what enters the first routed part of their
    block; from one gate for the whole model that sees the tokens before the first routed block ("early") or the last
    tokens of a static pass ("pass"); from a gate in every linear layer ("linear"); or they are given as w: [T] for all,
    [B, T] per sample, [B, N, T] per token. Made by merging.routing.install.

    torch.compile makes one graph of it, whatever its gates, and then neither groups rows nor notices replaced modules.
    Threads may share a model. The libraries' activation checkpointing may recompute a block once, before the next
    forward and in the thread of the forward.
    """

    def __init__(self, module: nn.Module, blocks: list[Block], outer: Holder, parts: int | None):
        super().__init__()
        self.module, self.blocks, self.outer, self.parts = module, blocks, outer, parts
        self.stem_routed = False  # whether something in front of the blocks is routed
        self.gates = nn.ModuleList()
        self.sees: Sees | Literal["given", "linear"] = "given"
        self.kernel, self.state = "auto", State()
        self.links: list[tuple[nn.Module, str, nn.Module]] = []  # parent, name, child on the way to what is routed
        for index, block in enumerate(blocks):
            block.module.register_forward_pre_hook(partial(self._enter, index), with_kwargs=True)
        if blocks:
            blocks[self.last].module.register_forward_hook(self._leave)
        module.register_forward_pre_hook(self._begin, with_kwargs=True)
        module.register_forward_hook(self._end)

    @property
    def last(self) -> int:
        """Index of the last block of the first stack: of an encoder and a decoder, the encoder's."""
        stack = self.blocks[0].name.rpartition(".")[0]
        return max(i for i, block in enumerate(self.blocks) if block.name.rpartition(".")[0] == stack)

    @property
    def first_routed(self) -> int:
        """Index of the first block that is routed; -1 if something before the blocks is."""
        if self.stem_routed:
            return -1
        return next((i for i, block in enumerate(self.blocks) if block.routed), len(self.blocks))

    @property
    def gate(self) -> Gate | None:
        """The one gate of the model, or the first of its blocks'."""
        return cast(Gate, self.gates[0]) if len(self.gates) else None

    def gates_of(self, shape: GateShape) -> int:
        """How many gates of that shape the model takes."""
        return sum(block.routed for block in self.blocks) if shape.sees == "block" and not shape.shared else 1

    def use(self, kernel: str) -> "Routed":
        """Choose how mixed weights are applied; the kernels agree up to rounding.

        auto: factored, but samples with the same weights are grouped. factored: never builds a mixed matrix. grouped:
        clusters of equal weights. folded: as grouped, always through dense weights. materialised: a dense matrix per
        sample.
        """
        if kernel not in KERNELS:
            raise UserError(f"kernel={kernel!r} is unknown. Choose one of {', '.join(KERNELS)}.")
        for module in self.modules():
            if isinstance(module, Routed | Linear):
                module.kernel = kernel
        return self

    def forward(self, *inputs: Any, w: Tensor | None = None, **kwargs: Any) -> Any:
        """What the module returns. w: weights in place of the gates'.

        Raises UserError for a w of another shape, a missing one, and a module that was changed since.
        """
        self._check_links()
        if w is None and any(continued(kwargs.get(name)) for name in CACHES):  # the prompt has decided
            with self._during(asks=False):
                return self.module(*inputs, **kwargs)
        w = self._decided(w, ("pass",), inputs, kwargs)
        if w is None or self._caches(kwargs):
            return self._run(w, inputs, kwargs)
        return clustered(self._run, w, self.kernel, inputs, kwargs)

    def generate(self, *inputs: Any, w: Tensor | None = None, **kwargs: Any) -> Any:
        """As the module's own `generate`; w is given, or decided once for each prompt."""
        self._check_links()
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        w = self._decided(w, ("early", "pass"), inputs, tensors)
        with self._during(asks=w is None, generates=True):
            self.put(w)
            return self.module.generate(*inputs, **kwargs)  # type: ignore[operator]

    def _decided(self, w: Tensor | None, before: tuple[str, ...], inputs: tuple, kwargs: dict) -> Tensor | None:
        """The w of a forward: given, or asked of a gate that is asked before it; None where gates answer inside."""
        if w is None and self.sees in before:
            w = self.weights(*inputs, **kwargs)
        if w is not None:
            self._check(w, len(first_tensor(inputs, kwargs)))
        elif self.sees == "given" and self.parts is not None:
            raise UserError(NO_GATE)
        return w

    def weights(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """What the model's one gate answers for inputs, [B, T] (early and pass)."""
        return self._one_gate(self.seen(*inputs, **kwargs))

    def seen(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """The tokens [B, N, d] that the model's one gate is shown (early and pass)."""
        block = self.gate.shape.after if self.gate is not None and self.sees == "pass" else self.first_routed
        return self.tokens(("leave", self.last) if block is None else ("enter", block), *inputs, **kwargs)

    def tokens(self, stop: tuple[str, int], *inputs: Any, **kwargs: Any) -> Tensor:
        """Tokens [B, N, d] of a static pass that ends where it enters or leaves a block."""
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHES}
        of_inputs = any(isinstance(x, Tensor) and x.requires_grad for x in (*inputs, *kwargs.values()))
        graph = torch.is_grad_enabled() and of_inputs  # all else in it is frozen
        with torch.set_grad_enabled(graph), self._during(asks=False, stop=stop):
            self.put(None)
            return reached(partial(self.module, *inputs, **kwargs), stop[1])

    def observed(self, observer: Observer, *inputs: Any, **kwargs: Any) -> Any:
        """A forward in which `observer`(block, tokens) answers in place of the blocks' gates."""
        with self._during(asks=True, observer=observer):
            self.put(None)
            return self.module(*inputs, **kwargs)

    def put(self, w: Tensor | None) -> None:
        """Have the module run under w in this thread, until the next forward."""
        self.outer.w = w
        for block in self.blocks:
            block.holder.w = w

    @contextmanager
    def _during(self, **what: Any) -> Iterator[None]:
        before = {name: getattr(self.state, name) for name in what}
        for name, value in what.items():
            setattr(self.state, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.state, name, value)

    def _run(self, w: Tensor | None, inputs: tuple, kwargs: Mapping[str, Any]) -> Any:
        self.put(w)
        self.state.asks = w is None
        return self.module(*inputs, **kwargs)

    def _one_gate(self, tokens: Tensor) -> Tensor:
        if self.gate is None:
            raise UserError(NO_GATE)
        return self.gate(tokens, self.mask_of(tokens))

    def mask_of(self, tokens: Tensor) -> Tensor | None:
        """Which of the tokens are no padding, [B, N], if the inputs say so."""
        mask = self.state.mask
        return mask if mask is not None and mask.shape == tokens.shape[:2] else None

    def _caches(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the forward returns a cache of keys and values, which is not put together from groups."""
        default = getattr(getattr(self.module, "config", None), "use_cache", False)
        return bool(kwargs.get("use_cache", default))

    def _check(self, w: Tensor, samples: int) -> None:
        parts = self.parts if self.parts is not None or not w.ndim else w.shape[-1]
        if w.ndim not in (1, 2, 3) or w.shape[-1] != parts or (w.ndim > 1 and len(w) != samples):
            raise UserError(
                f"w has shape {tuple(w.shape)}, but this model mixes {parts} parts for {samples} samples: give "
                f"[{parts}], the same for all, [{samples}, {parts}], or [{samples}, tokens, {parts}]."
            )

    def _check_links(self) -> None:
        """Raises UserError where a module on the way to a routed one was replaced."""
        if torch.compiler.is_compiling():
            return
        for parent, name, child in self.links:
            if parent._modules.get(name) is not child:
                raise UserError(
                    f"{name} of {type(parent).__name__} was replaced after the merge was put into the model, so that "
                    f"its weights would no longer be mixed. Change the model first, then call install."
                )

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.state.mask = kwargs.get("attention_mask")
        w = self.outer.w
        if self.state.generates and w is not None and w.ndim > 1:  # beams: a prompt's rows lie side by side
            rows = len(first_tensor(args, kwargs, "decoder_input_ids"))
            if rows != len(w):
                for holder in (self.outer, *(block.holder for block in self.blocks)):
                    holder.w = None if holder.w is None else holder.w.repeat_interleave(rows // len(w), 0)

    def _enter(self, index: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state = self.state
        if state.stop == ("enter", index):
            raise Reached(first_tensor(args, kwargs))
        if not state.asks:
            return
        if self.sees == "block":
            self.blocks[index].holder.w = None
        elif self.sees == "early" and index == self.first_routed:
            self.put(self._one_gate(first_tensor(args, kwargs)))

    def _ask(self, index: int, part: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """At every routed part of a block: the first that runs asks the block's gate."""
        holder = self.blocks[index].holder
        again = holder.asker is part  # a recomputed block need not pass `_enter` once more
        if not self.state.asks or (holder.w is not None and not again):
            return
        tokens = first_tensor(args, kwargs)
        if isinstance(part, Substituted):
            tokens = part.static(tokens)
        if self.state.observer is not None:
            w = self.state.observer(index, tokens)
        else:
            w = self.gate_of(index)(tokens, self.mask_of(tokens))
        self.outer.w = holder.w = w
        holder.asker = part

    def gate_of(self, index: int) -> Gate:
        """The gate of a routed block."""
        position = 0 if len(self.gates) == 1 else sum(block.routed for block in self.blocks[:index])
        return cast(Gate, self.gates[position])

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.state.stop == ("leave", self.last):
            raise Reached(first_tensor((output,) if isinstance(output, Tensor) else tuple(output), {}))

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.state.generates:  # the prompt has been read
            self.state.asks = False

    def split(self, index: int, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """The forward of a block's part, its rows sorted by the weights that a gate gave."""
        holder = self.blocks[index].holder
        if holder.w is None or not self.state.asks:
            return forward(*args, **kwargs)

        def run(w: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Any:
            before, holder.w = holder.w, w
            try:
                return forward(*args, **kwargs)
            finally:
                holder.w = before

        return clustered(run, holder.w, self.kernel, args, kwargs)
