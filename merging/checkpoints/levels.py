"""Where the weights lie in what a pickle holds: a state dict, a module, or a level of a training script's dict."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from merging.checkpoints.inert import Shell, Unsupported
from merging.checkpoints.torch_files import View
from merging.preflight import some

MOST_MODULES = 10_000  # a module that holds another twice, forty levels deep, would have 2^40
DEEPEST = 4  # levels
BESIDE = re.compile(r"optim.*|.*sched.*|.*scaler.*|.*rng.*|hyper_parameters|hparams|callbacks|loops|args|config", re.I)
Level = dict | Shell


class Weights(NamedTuple):
    """Named tensors, and what is to be said of where they were."""

    views: dict[str, View]
    remarks: tuple[str, ...] = ()


def weights(root: object) -> Weights:
    """The tensors of a state dict, of the only level of a dict that holds any, or of a whole module.

    Raises Unsupported where there are none, or two levels with some; ValueError for tensors in a form that is not
    known: none is skipped.
    """
    if isinstance(root, Shell) and _is_module(root):
        return Weights(dict(_walk(root)))
    if not isinstance(root, dict):
        what = root.name if isinstance(root, Shell) else type(root).__name__
        raise Unsupported(f"it holds a {what}, neither a module nor a state dict")
    levels = dict(_levels(root, (), set())) or {(): root}
    if len(levels) > 1:
        raise Unsupported(
            f"it holds weights more than once, as {some([label(path) for path in levels], 8)}, and which are meant is "
            f"not guessed. Save the right ones alone: torch.save(torch.load(path)[name], new)"
        )
    ((path, level),) = levels.items()
    views = dict(_walk(level) if isinstance(level, Shell) else _tensors(_named(level)))
    return Weights(views, (remark(path, root),) if path else ())


def label(path: tuple[str, ...]) -> str:
    return ".".join(path) or "its top level"


def remark(path: tuple[str, ...], root: dict) -> str:
    """Which level was read, and what is beside it."""
    rest = [str(name) for name in root if name != path[0]]
    return f"read from its level {label(path)}" + (f", without {some(rest, 8)} beside it" if rest else "")


def _levels(holder: dict, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], Level]]:
    """Dicts and modules that hold weights. Single tensors beside such a level, as of a loss, are none themselves."""
    seen.add(id(holder))
    below: list[tuple[tuple[str, ...], Level]] = []
    for name, value in holder.items() if len(path) < DEEPEST else ():
        if not isinstance(name, str) or BESIDE.fullmatch(name) or id(value) in seen:
            continue
        if isinstance(value, Shell) and _is_module(value) and any(_walk(value)):
            seen.add(id(value))
            below.append(((*path, name), value))
        elif isinstance(value, dict) and "param_groups" not in value:  # an optimizer has them
            below.extend(_levels(value, (*path, name), seen))
    own = [name for name, value in _named(holder) if _is_weight(value)]
    if own and (not below or any("." in name for name in own)):
        yield path, holder
    yield from below


def _is_weight(value: object) -> bool:
    return isinstance(value, View) and value.storage.dtype.is_floating_point and len(value.shape) > 0


def _is_module(shell: Shell) -> bool:
    return "_parameters" in shell.attributes or "_modules" in shell.attributes


def _tensors(named: Iterable[tuple[str, object]]) -> Iterator[tuple[str, View]]:
    """Those that are tensors; numbers, text and the like are left out."""
    for key, value in named:
        if isinstance(value, Shell) and "_rebuild" in value.name:
            raise Unsupported(f"its tensor {key} is made by {value.name}, which is not known here")
        if isinstance(value, View):
            yield key, value


def _walk(root: Shell) -> Iterator[tuple[str, View]]:
    """What `state_dict()` of the module would give: parameters, persistent buffers, then submodules."""
    waiting = [(root, "")]
    for _ in range(MOST_MODULES):
        if not waiting:
            return
        module, prefix = waiting.pop()
        hidden = module.attributes.get("_non_persistent_buffers_set") or ()
        for kind in ("_parameters", "_buffers"):
            kept = ((name, each) for name, each in _part(module, kind) if kind != "_buffers" or name not in hidden)
            yield from _tensors((prefix + name, each) for name, each in kept)
        inner = [(each, f"{prefix}{name}.") for name, each in _part(module, "_modules") if isinstance(each, Shell)]
        waiting.extend(reversed(inner))
    raise Unsupported(f"it has more than {MOST_MODULES} modules, or one that holds itself")


def _named(holder: dict) -> list[tuple[str, object]]:
    return [(key, value) for key, value in holder.items() if isinstance(key, str)]


def _part(module: Shell, kind: str) -> list[tuple[str, object]]:
    named = module.attributes.get(kind) or {}
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"the {kind} of a {module.name} have no names")
    return list(named.items())
