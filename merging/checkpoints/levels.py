"""Where the weights lie in what a pickle holds: a state dict, a module, or a level of a training script's dict."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from merging.checkpoints.inert import Shell, Unsupported
from merging.checkpoints.torch_files import Strided
from merging.preflight import some

MOST_MODULES = 10_000  # a module that holds another twice, forty levels deep, would have 2^40
DEEPEST = 4  # levels
BESIDE = re.compile(r"optim.*|.*sched.*|.*scaler.*|.*rng.*|hyper_parameters|hparams|callbacks|loops|args|config", re.I)
Path = tuple[str, ...]


def weights(root: object) -> tuple[dict[str, Strided], tuple[str, ...]]:
    """The tensors of a state dict, of the only level of a dict that holds any, or of a whole module; and remarks.

    Raises Unsupported where there are none, or two levels with some; ValueError for tensors in a form that is not
    known: none is skipped.
    """
    if _is_module(root):
        return dict(_state(root)), ()
    if not isinstance(root, dict):
        what = root.name if isinstance(root, Shell) else type(root).__name__
        raise Unsupported(f"it holds a {what}, neither a module nor a state dict")
    levels = dict(_levels(root, (), set())) or {(): root}
    if len(levels) > 1:
        names = some([".".join(path) or "its top level" for path in levels], 8)
        raise Unsupported(
            f"it holds weights more than once, as {names}, and which are meant is "
            f"not guessed. Save the right ones alone: torch.save(torch.load(path)[name], new)"
        )
    ((path, level),) = levels.items()
    tensors = dict(_state(level) if isinstance(level, Shell) else _tensors(level.items()))
    beside = [str(name) for name in root if name not in path[:1]]
    without = f", without {some(beside, 8)} beside it" if beside else ""
    return tensors, (f"read from its level {'.'.join(path)}{without}",) if path else ()


def _levels(holder: dict, path: Path, seen: set[int]) -> Iterator[tuple[Path, Any]]:
    """Dicts and modules that hold weights. Single tensors beside such a level, as of a loss, are none themselves."""
    seen.add(id(holder))
    below: list[tuple[Path, Any]] = []
    for name, value in holder.items() if len(path) < DEEPEST else ():
        if not isinstance(name, str) or BESIDE.fullmatch(name) or id(value) in seen:
            continue
        if _is_module(value) and any(_state(value)):
            seen.add(id(value))
            below.append(((*path, name), value))
        elif isinstance(value, dict) and "param_groups" not in value:  # an optimizer has them
            below.extend(_levels(value, (*path, name), seen))
    names = [key for key, value in holder.items() if isinstance(key, str) and isinstance(value, Strided)
             and value.is_weight]  # fmt: skip
    if names and (not below or any("." in name for name in names)):
        yield path, holder
    yield from below


def _is_module(value: object) -> bool:
    return isinstance(value, Shell) and not {"_parameters", "_modules"}.isdisjoint(value.attributes)


def _tensors(named: Iterable[tuple[object, object]]) -> Iterator[tuple[str, Strided]]:
    """Those that are tensors; numbers, text and the like are left out."""
    for key, value in named:
        if isinstance(value, Shell) and "_rebuild" in value.name:
            raise Unsupported(f"its tensor {key} is made by {value.name}, which is not known here")
        if isinstance(key, str) and isinstance(value, Strided):
            yield key, value


def _state(root: Any) -> Iterator[tuple[str, Strided]]:
    """What `state_dict()` of the module would give: parameters, persistent buffers, then submodules."""
    waiting: list[tuple[Shell, str]] = [(root, "")]
    for _ in range(MOST_MODULES):
        if not waiting:
            return
        module, prefix = waiting.pop()
        hidden = module.attributes.get("_non_persistent_buffers_set") or ()
        parameters, buffers, modules = (_named(module, kind) for kind in ("_parameters", "_buffers", "_modules"))
        persistent = {name: value for name, value in buffers.items() if name not in hidden}
        yield from _tensors((prefix + name, value) for name, value in [*parameters.items(), *persistent.items()])
        inner = [(value, f"{prefix}{name}.") for name, value in modules.items() if isinstance(value, Shell)]
        waiting.extend(reversed(inner))
    raise Unsupported(f"it has more than {MOST_MODULES} modules, or one that holds itself")


def _named(module: Shell, kind: str) -> dict[str, object]:
    named = module.attributes.get(kind) or {}
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"the {kind} of a {module.name} have no names")
    return named
