"""The calls of library use: `merge`, `load`, `open_merged`."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from merging import saving, saving_folder
from merging.backbones.base import from_facts
from merging.cache import Cache
from merging.checkpoints import identify_ahead
from merging.checkpoints.tied import filled
from merging.context import ALONE, Context
from merging.errors import UserError
from merging.experts import Experts, Source
from merging.merged import Merged
from merging.methods.method import call
from merging.preflight import check_method, some
from merging.routing.install import install

if TYPE_CHECKING:
    from merging.fit.gates import Router

log = logging.getLogger(__name__)


def merge(
    method: Callable[..., Merged],
    base: Source,
    experts: Sequence[Source],
    tasks: Sequence[str] | None = None,
    cache: Cache | None = None,
    context: Context = ALONE,
    router: "Router | None" = None,
) -> Merged:
    """Merge experts fine-tuned from `base`; each is a path (safetensors, or a pickle, of which nothing runs), a state
    dict or a Checkpoint.

    `method` is an object of merging.methods or any function of Experts; `context` has the data of the tasks, for those
    that look at it; `router` trains the gates of a merge that waits for some. What is not merged, such as integer
    buffers, is the base's; a warning says where it differs. Raises UserError for experts that do not fit.
    """
    check_method(method)
    return merged_from(method, Experts.open(base, experts, tasks, cache, device=context.device), context, router)


def merged_from(
    method: Callable[..., Merged], opened: Experts, context: Context = ALONE, router: "Router | None" = None
) -> Merged:
    """`merge` of experts that are open."""
    if opened.differing:
        log.warning("%s", opened.differing)
    if opened.remarks:
        log.info("%s", "; ".join(opened.remarks))
    identify_ahead((opened.origin, *opened.checkpoints))  # saving asks for the ids
    merged = call(method, opened, context.acting(str(describe(method)["name"]), method))
    if router is not None and merged.routing is not None and merged.routing.router == "learned":
        merged, _ = router.fit(merged, opened, context.acting(f"router={router.name}"))
    about = {"method": describe(method)} | ({"remarks": opened.remarks} if opened.remarks else {})
    return replace(merged, provenance={**merged.provenance, **about}, inputs=opened.inputs, heads=opened.heads)


def describe(method: object) -> dict[str, object]:
    """A method's name and options as JSON."""
    if is_dataclass(method):
        options: dict[str, object] = {option.name: getattr(method, option.name) for option in fields(method)}
        return {"name": type(method).__name__, **{name: _plain(value) for name, value in options.items()}}
    return {"name": getattr(method, "__name__", repr(method))}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):  # of any kind, also a configuration's
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):  # such as the objectives of a descent
        return [_plain(inner) for inner in value]
    return describe(value) if callable(value) or is_dataclass(value) else value


def load(path: str | Path, backbone: nn.Module | None = None) -> nn.Module:
    """A saved merge as a model ready to call, in evaluation mode.

    `backbone` is the module to fill; it may be left out for a folder, and for a file whose header names its
    architecture, as those of `duet` do. A merge whose weights depend on the input becomes a Routed: it routes by
    itself, or where the true task chooses takes the weights of the parts, `model(images, w=w)`. Raises UserError for a
    file that is no merge, or whose parameters do not fit the backbone.
    """
    merged = saving.read(path)
    model, facts = backbone, merged.provenance.get("backbone")
    if model is None:
        facts = saving_folder.facts_of(Path(path)) if facts is None else facts
        if facts is None:
            raise UserError(
                f"{path} does not say which architecture it is for. Pass the module to fill: load(path, backbone)."
            )
        model = from_facts(facts).build()  # type: ignore[arg-type]
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    try:
        dense = {key: merged.base.tensor(key) for key in merged.base.specs()}
        stored = filled(dense | {key: merged.static(key) for key in merged.packed}, model)
        check_fit({key: tensor.shape for key, tensor in stored.items()}, expected)
        if merged.deltas:
            return install(model, merged)
        model.load_state_dict({key: tensor.clone() for key, tensor in stored.items()})
    except (RuntimeError, UserError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{path} does not fit {type(model).__name__}: {reason}. Pass the backbone it was merged for."
        ) from error
    return model.eval()


def check_fit(have: Mapping[str, torch.Size], want: Mapping[str, torch.Size]) -> None:
    """Raises UserError naming the first parameters that are missing, unknown or of another shape."""
    for names, what in ((want.keys() - have.keys(), "it lacks"), (have.keys() - want.keys(), "it has the unknown")):
        if names:
            raise UserError(f"{what} {some(sorted(names))}")
    for key, shape in want.items():
        if have[key] != shape:
            raise UserError(f"{key} is {tuple(have[key])} in the file and {tuple(shape)} in the module")


open_merged = saving.read
