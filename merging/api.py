"""The two calls of library use: `merge` and `load`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

from torch import nn

from merging.backbones.tower import ImageTower
from merging.cache import Cache
from merging.checkpoints import SafetensorsFile
from merging.errors import UserError
from merging.experts import Experts, Source
from merging.merged import FORMAT, Merged


def merge(
    method: Callable[[Experts], Merged],
    base: Source,
    experts: Sequence[Source],
    tasks: Sequence[str] | None = None,
    cache: Cache | None = None,
) -> Merged:
    """Merge experts fine-tuned from `base`; each is a safetensors path, a state dict or a Checkpoint.

    `method` is an object of merging.methods or any function of Experts. Raises UserError for experts that do not fit.
    """
    opened = Experts.open(base, experts, tasks, cache)
    return replace(
        method(opened), provenance={"method": describe(method), "experts": [e.id for e in opened.checkpoints]}
    )


def describe(method: object) -> dict[str, object]:
    """A method's name and knobs as JSON."""
    if is_dataclass(method):
        knobs: dict[str, object] = {knob.name: getattr(method, knob.name) for knob in fields(method)}
        inner = {name: describe(value) if callable(value) else value for name, value in knobs.items()}
        return {"name": type(method).__name__, **inner}
    return {"name": getattr(method, "__name__", repr(method))}


def load(path: str | Path, backbone: nn.Module | None = None) -> nn.Module:
    """A saved merge as a model ready to call, in evaluation mode.

    `backbone` is the module to fill; it may be left out for a file whose header names its architecture, as those of
    `duet` do. Raises UserError for a file that is no merge, or whose parameters do not fit the backbone.
    """
    file = SafetensorsFile(path)
    if file.metadata.get("format") != FORMAT:
        raise UserError(f"{path} was not written by this library ({FORMAT}). Load plain weights with safetensors.")
    model = backbone
    if model is None:
        facts = json.loads(file.metadata["provenance"]).get("backbone")
        if facts is None:
            raise UserError(
                f"{path} does not say which architecture it is for. Pass the module to fill: load(path, backbone)."
            )
        model = ImageTower(**facts)
    try:
        model.load_state_dict({key: file.tensor(key).clone() for key in file.specs()})
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{path} does not fit {type(model).__name__}: {reason}. Pass the backbone it was merged for."
        ) from error
    return model.eval()
