"""Multiply-accumulates of a merged model for one sample, from shapes alone."""

import math

from merging.backbones.base import Backbone
from merging.deltas import Delta, LowRank, Rows
from merging.merged import Merged, Routing


def macs(merged: Merged, backbone: Backbone) -> int:
    """The static forward, what the deltas add, the gates, the second pass of a gate that asks for one, a correction."""
    corrections = merged.corrections.values()  # all of one size, and the true task's alone is at work
    static, routing = backbone.macs + max((each.macs for each in corrections), default=0), merged.routing
    if routing is None or routing.by_task:  # one dense model per task: nothing is added
        return static
    added = sum(delta_macs(key, delta, backbone, routing) for key, delta in merged.deltas.items())
    return static + pass_macs(merged, backbone) + added + gate_macs(merged, backbone)


def pass_macs(merged: Merged, backbone: Backbone) -> int:
    """The static pass in front of a gate that asks for one; of a part of the blocks their share of a forward."""
    gate = merged.routing.gate if merged.routing is not None else None
    if gate is None or gate.sees != "pass":
        return 0
    if gate.after is None:
        return backbone.macs
    return math.ceil(backbone.macs * gate.after / len({backbone.param(key).block for key in merged.specs} - {None}))


def delta_macs(key: str, delta: Delta, backbone: Backbone, routing: Routing) -> int:
    """What one delta adds to a sample's forward."""
    info, by_token = backbone.param(key), routing.granularity == "token"
    tokens, patches = 1 if info.pooled else backbone.tokens, len(delta.shape) == 4  # which lack the class token
    if info.kind == "embedding" and not patches:  # added to the tokens, so it is mixed, not applied
        rows = delta.shape[0] if len(delta.shape) == 2 else 1
        return delta.mix_macs() * min(tokens, rows) // rows
    tokens -= patches
    if routing.router == "subspace":
        return subspace_macs(delta.transposed() if info.transposed else delta, tokens, routing)
    used = routing.gate.used(delta.parts) if routing.gate is not None else None
    if len(delta.shape) == 1:
        return delta.macs(1, used=used) * (tokens if by_token else 1)
    return delta.macs(tokens, by_token, used)


def subspace_macs(delta: Delta, tokens: int, routing: Routing) -> int:
    """SMILE: every token asks T k_g directions, and uses top_k experts."""
    if isinstance(delta, Rows):
        return sum(subspace_macs(part, tokens, routing) for part in delta.blocks)  # type: ignore[arg-type]
    if not isinstance(delta, LowRank):
        return tokens * (routing.top_k or delta.parts) * delta.shape.numel()
    m, n = delta.sides()
    ranks = (routing.top_k or delta.parts) * delta.rank
    return tokens * (delta.parts * min(routing.gate_rank, delta.rank) * n + ranks * (m + n))


def gate_macs(merged: Merged, backbone: Backbone) -> int:
    """All gates together; a shared one is asked by every routed block."""
    routing = merged.routing
    if routing is None or routing.gates is None or routing.gate is None:
        return 0
    one = routing.gates[0].macs(backbone.tokens)  # type: ignore[operator]
    asked = blocks_routed(merged, backbone) if routing.gate.shared else len(routing.gates)
    return one * asked


def blocks_routed(merged: Merged, backbone: Backbone) -> int:
    """How many blocks hold a routed parameter."""
    return len({backbone.param(key).block for key in merged.deltas} - {None})
