"""Puts a merge into any module, by exchanging the modules that own its changed parameters."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from torch import nn

from merging.deltas import Delta, LowRank, OnDemand, Rows, rebuild
from merging.errors import UserError
from merging.merged import Merged, Routing
from merging.routing.foreign import LINEAR, Attention, Substituted, leaf, route_relative_bias, vision
from merging.routing.gates import Subspace
from merging.routing.leaves import Conv, Linear, Split
from merging.routing.mixing import Holder
from merging.routing.routed import Block, Routed

UNREAD = {"RobertaLMHead", "BertLMPredictionHead"}  # own a bias that only their decoder reads, under the same tensor
Deltas = dict[str, dict[str, Delta]]  # name of the owner -> name of the parameter -> its delta


def install(module: nn.Module, merged: Merged, blocks: Sequence[nn.Module] | None = None) -> Routed:
    """The module with the merge inside, gates included; the module given is left as it is, the tensors are shared.

    blocks: the modules that gates sit in, by default the repeated ones (`repeated`). Raises UserError for a delta that
    fits no parameter, one in a module that nothing is written for, and for gates that do not fit the blocks.
    """
    names = {id(child): name for name, child in module.named_modules()}
    blocks = repeated(module) if blocks is None else blocks
    copied = duplicate(module)
    fill(copied, merged)
    owners = deltas_of(copied, merged)
    copies = [Block(names[id(block)], copied.get_submodule(names[id(block)])) for block in blocks]
    routed = Routed(copied, copies, Holder(), merged.parts if merged.deltas else None)
    paths = list(swap(routed, owners))
    find_parts(routed, paths)
    if merged.routing is not None:
        attach(routed, merged.routing)
    link(routed, paths)
    return routed.eval()


def repeated(module: nn.Module) -> list[nn.Module]:
    """The modules of the outermost lists whose members are all of one class: transformer blocks, by structure."""
    blocks: list[nn.Module] = []
    for child in module.children():
        members = list(child) if isinstance(child, nn.ModuleList) else []
        blocks += members if len({type(block) for block in members}) == 1 else repeated(child)
    return blocks


def tied_names(module: nn.Module) -> list[list[str]]:
    """The names of every parameter and floating buffer: several where modules share it."""
    groups: dict[int, list[str]] = {}
    named = (module.named_parameters, module.named_buffers)
    for name, tensor in (pair for of in named for pair in of(remove_duplicate=False)):
        if tensor.is_floating_point():
            groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def fill(module: nn.Module, merged: Merged) -> None:
    """What all inputs share, as frozen parameters. Raises UserError for parameters that the merge does not have."""
    persistent = module.state_dict().keys()
    for names in tied_names(module):
        key = next((name for name in names if name in merged.specs), None)
        if key is None:
            if persistent & set(names):
                raise UserError(
                    f"The model has the parameter {names[0]}, which the merge has not: its weight is not known."
                )
            continue
        weight = nn.Parameter(merged.static(key), requires_grad=False)
        for name in names:
            owner, _, leaf = name.rpartition(".")
            owner = module.get_submodule(owner)
            if weight.shape != (have := getattr(owner, leaf).shape):
                raise UserError(f"{key} is {tuple(weight.shape)} in the merge and {tuple(have)} in the model.")
            if leaf in owner._buffers:
                owner._buffers[leaf] = weight.data
            else:
                owner._parameters[leaf] = weight


def deltas_of(module: nn.Module, merged: Merged) -> Deltas:
    """The deltas by the module that owns their parameter, under all names of it.

    They are modules of their own over the same tensors: moving the model leaves the merge where it is.
    """
    names = {name: group for group in tied_names(module) for name in group}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    owners: Deltas = {}
    for key, delta in merged.deltas.items():
        if key not in parameters or delta.shape != parameters[key].shape:
            have = tuple(parameters[key].shape) if key in parameters else "not there"
            raise UserError(f"The delta of {key} is for shape {tuple(delta.shape)}, the parameter is {have}.")
        if delta.parts != merged.parts:
            raise UserError(f"The delta of {key} mixes {delta.parts} parts, the gate gives {merged.parts} weights.")
        if not isinstance(delta, OnDemand):
            delta = rebuild(delta.facts(), dict(delta.named_buffers()))
        for name in names[key]:
            owner, _, leaf = name.rpartition(".")
            owners.setdefault(owner, {})[leaf] = delta
    return owners


def swap(routed: Routed, owners: Deltas) -> Iterator[str]:
    """Exchange the owners of deltas; the names of what is routed now."""
    module, made = routed.module, {}
    for path in attentions(module, owners):
        replace(module, path, Attention(module.get_submodule(path), path, owners, holder_of(routed, path)))  # type: ignore[arg-type]
        yield from (f"{path}.{name}" for name in ("in_proj", "out_proj") if owners.keys() & {path, f"{path}.{name}"})
    for path, deltas in owners.items():
        old = module.get_submodule(path)
        if isinstance(old, Attention | Linear) or type(old).__name__ in UNREAD:
            continue
        if id(old) not in made:
            made[id(old)] = leaf(old, deltas, holder_of(routed, path), path)
        if path:
            replace(module, path, made[id(old)])
        yield path
    for attention in module.modules():
        if isinstance(getattr(attention, "relative_attention_bias", None), Substituted):
            route_relative_bias(attention)


def attentions(module: nn.Module, owners: Deltas) -> list[str]:
    """The names of torch's attention modules that have deltas, and of open_clip's over one input, faster exchanged."""
    modules = dict(module.named_modules())

    def exchanged(name: str) -> bool:
        block = modules[name.rpartition(".")[0]]
        over_itself = type(block).__name__ == "ResidualAttentionBlock" and not hasattr(block, "ln_1_kv")
        return over_itself or bool(owners.keys() & {name, f"{name}.out_proj"})

    return [name for name, child in modules.items() if isinstance(child, nn.MultiheadAttention) and exchanged(name)]


def holder_of(routed: Routed, path: str) -> Holder:
    """The holder of the block that a module lies in, or that of all outside the blocks."""
    return next((block.holder for block in routed.blocks if f"{path}.".startswith(f"{block.name}.")), routed.outer)


def find_parts(routed: Routed, paths: list[str]) -> None:
    """Note which parts of the blocks hold something routed, and whether something in front of the blocks does."""
    owners = {path: routed.module.get_submodule(path) for path in paths}
    for block in routed.blocks:
        children = block.module.children()
        lists = (child if isinstance(child, nn.ModuleList) else [child] for child in children)  # never called as such
        block.parts = [part for parts in lists for part in parts if not set(part.modules()).isdisjoint(owners.values())]
    order = {name: index for index, (name, _) in enumerate(routed.module.named_modules())}
    first = min((order[block.name] for block in routed.blocks), default=0)
    routed.stem_routed = any(
        order[path] < first and (not isinstance(owner, Substituted) or len(owner.deltas) > 0)  # proj comes after
        for path, owner in owners.items()
    )


def link(routed: Routed, paths: Iterable[str]) -> None:
    """Remember the way to everything that is routed."""
    steps = {path[:end] for path in paths if path for end in (*(i for i, c in enumerate(path) if c == "."), len(path))}
    parents = ((step.rpartition(".")[::2], step) for step in sorted(steps))
    get = routed.module.get_submodule
    routed.links = [(get(parent), name, get(step)) for (parent, name), step in parents]


def attach(routed: Routed, routing: Routing) -> None:
    """Give the model the gates of a routing; without trained gates it is left to be called with w.

    Raises UserError where the model has no blocks for them, or another number.
    """
    if routing.router == "subspace":
        attach_subspaces(routed, routing)
    if routing.gate is None or routing.gates is None:
        return
    check_blocks(routed, routing)
    routed.sees, routed.gates = routing.gate.sees, routing.gates
    for index, block in enumerate(routed.blocks):
        for part in block.parts:
            if routed.sees == "block":
                part.register_forward_pre_hook(partial(routed._ask, index), with_kwargs=True)
            if routed.sees != "pass" and any(isinstance(module, Linear) for module in part.modules()):
                part.forward = partial(routed.split, index, part.forward)


def check_blocks(routed: Routed, routing: Routing) -> None:
    """Raises UserError for gates that have no place in the model."""
    assert routing.gate is not None and routing.gates is not None
    if not routed.blocks:
        raise UserError(
            f"{type(routed.module).__name__} has no repeated blocks, before, in or behind which a gate could look at "
            f"its tokens: router.gate.sees={routing.gate.sees} cannot be used. Give the weights, model(inputs, w=w), "
            f"or name its blocks: install(module, merged, blocks)."
        )
    if (after := routing.gate.after) is not None and after > routed.last:
        raise UserError(
            f"router.gate.after={after} is behind the last of the {routed.last + 1} blocks of "
            f"{type(routed.module).__name__} that its gate may look at: set 0 to {routed.last}, or null for all."
        )
    indices = [index for index, block in enumerate(routed.blocks) if block.routed]
    behind = [index for index in indices if index > routed.last]
    if (routing.gate.sees == "block" and behind) or (routing.gate.sees == "early" and behind == indices):
        raise UserError(
            f"{type(routed.module).__name__} has an encoder and a decoder, and what it decodes is not there when its "
            f"gates are asked: router.gate.sees={routing.gate.sees} cannot route it. Set router.gate.sees=pass."
        )
    if routed.stem_routed and routing.gate.sees != "pass":
        raise UserError(
            f"router.gate.sees={routing.gate.sees} cannot weigh what comes before the blocks (patches, positions, "
            f"embeddings). Set router.gate.sees=pass, or keep the stem static: method.start=0."
        )
    if len(routing.gates) != (expected := routed.gates_of(routing.gate)):
        raise UserError(
            f"The merge has {len(routing.gates)} gates, but router.gate.sees={routing.gate.sees} needs {expected} in "
            f"{type(routed.module).__name__}: its blocks are not those that the gates were made for."
        )


def attach_subspaces(routed: Routed, routing: Routing) -> None:
    """SMILE: every routed linear layer gets a gate from the leading directions of its own delta."""
    routed.sees = "linear"
    for name, layer in list(routed.module.named_modules()):
        if isinstance(layer, Linear) and isinstance(layer.delta, Rows):
            replace(routed.module, name, Split(layer))
    for layer in routed.module.modules():
        if isinstance(layer, Linear) and isinstance(layer.delta, LowRank):
            directions = layer.delta.down.unflatten(0, (layer.delta.parts, -1))[:, : routing.gate_rank]
            layer.subspace = Subspace(directions, routing.top_k or layer.delta.parts)


def duplicate(module: nn.Module) -> nn.Module:
    """The same modules over the same tensors: what is exchanged or moved in the one stays in the other."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def replace(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)


def linear_in(module: nn.Module, key: str) -> nn.Module:
    """The module that a matrix is applied by, called with features [B, ..., n]: exchanged where it was not called.

    Raises UserError for a parameter that is not applied to features.
    """
    path, _, name = key.rpartition(".")
    attention = path.removesuffix(".out_proj")
    if isinstance(old := module.get_submodule(attention), nn.MultiheadAttention):
        replace(module, attention, Attention(old, attention, {}, Holder()))
    if name == "in_proj_weight":
        return module.get_submodule(f"{path}.in_proj")
    owner = module.get_submodule(path)
    if isinstance(owner, nn.Conv2d):
        replace(module, path, Conv(owner, {}, Holder(), path))
        owner = module.get_submodule(path)
    if isinstance(owner, Conv):
        return owner.linear
    if name == "proj" and type(owner).__name__ == "VisionTransformer":
        vision(owner, {"proj": None}, Holder(), path)
        return owner.get_submodule("projection")
    if name == "weight" and (type(owner) in (*LINEAR, Linear) or type(owner).__name__ == "Conv1D"):
        return owner
    raise UserError(
        f"{key} of {type(owner).__name__} is not a matrix that is applied to features, so that nothing is seen to go "
        f"into it. Ask for weights of linear layers, attention, patch embeddings and projections."
    )
