"""Checks the options of a composed configuration against the annotations of what they build, before anything is built.

The schema are the frozen dataclasses and functions that the configuration names; pydantic compares. A whole number may
stand for a float, nothing else is converted.
"""

import inspect
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ConfigDict, Field, PositiveFloat, TypeAdapter, ValidationError

from launchers.sweeps.axes import GROUPS, names, parsed, unknown
from launchers.sweeps.check import PARTS
from merging.errors import UserError

SPELLED = {"a valid array": "[{}]", "a valid string": '"{}"'}  # in pydantic's words -> a single value as such
PLAIN = (int, float, bool, str, NoneType)
BY_TASK = ("experts.paths", "suite.sources")  # mappings from tasks


RUN: dict[str, Any] = {  # options that belong to no group -> their type; see conf/config.yaml
    "seed": Annotated[int, Field(ge=0, lt=2**63)], "split": Literal["test", "val"], "probe": bool, "redo": bool,
    "output": str, "save": str | None, "save_adapter": bool, "shard_gb": PositiveFloat, "push": str | None,
    "save_dtype": Literal["fp32", "bf16", "fp16"] | None, "cache_gb": PositiveFloat, "plot": Mapping[str, Any] | None,
}  # fmt: skip
FINETUNE = RUN | {"folder": str, "every": float, "multitask": bool}  # conf/finetune.yaml
MOTIVATION = RUN | {"mass": float}  # conf/motivation.yaml


def check(config: DictConfig, overrides: Sequence[str] = (), schema: Mapping[str, Any] = RUN) -> None:
    """Raises UserError for an option that nothing reads, or whose value is not of the type that is asked for.

    `overrides` are those of the command line: what they add must be read, too. What is to be built is imported.
    """
    values, text = check_run(config, schema), OmegaConf.to_yaml(config, resolve=False)
    known = [*schema, *PARTS, *GROUPS]
    for name in [*PARTS, *({"recipe"} & values.keys())]:
        if not isinstance(values.get(name), dict):
            raise UserError(f"There is no {name}, which every run needs. Choose one: {name}=<name>.")
        check_part(name, values[name])
    for override in parsed(overrides):
        if not override.is_delete():
            _check_task(override.key_or_group.split("."), values)
        top = override.key_or_group.replace("@", ".").replace("/", ".").partition(".")[0]
        added = override.is_add() or override.is_force_add()
        if added and top != "hydra" and top not in known and f"${{{top}" not in text:
            raise UserError(unknown([top], names(dict.fromkeys(known))) + " Nothing reads it.")


def check_run(config: DictConfig, schema: Mapping[str, Any] = RUN) -> dict[str, Any]:
    """The values of the configuration. Raises UserError for those of the run itself, and for a reference to nothing.

    Nothing is imported for it.
    """
    try:
        values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value. Set it: {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{error.full_key} has no value: {reason}. Set it, or what it refers to.") from error
    for name, annotation in schema.items():
        if name not in values:
            raise UserError(f"The configuration has no {name}. Its file should start with conf/config.yaml.")
        check_value(name, values[name], annotation)
    return values


def check_part(path: str, values: Mapping[str, Any]) -> None:
    """As `check`, for one part of the configuration and those inside it; `path` is its name on the command line."""
    known = options(values["_target_"]) if "_target_" in values else None
    for name, value in values.items():
        if known is not None and not name.startswith("_"):
            if name not in known:
                raise UserError(unknown([*path.split("."), name], names(known)))
            check_value(f"{path}.{name}", value, known[name])
        if isinstance(value, dict):
            check_part(f"{path}.{name}", value)


def options(target: str) -> dict[str, Any] | None:
    """What a `_target_` is built from: name -> type, as far as YAML can hold it.

    None for one that takes any name, or cannot be imported: building it says why.
    """
    try:
        built = get_object(target)
    except (ImportError, ValueError):
        return None
    parameters = inspect.signature(built).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    try:
        hints = get_type_hints(built.__init__ if isinstance(built, type) else built)
    except NameError:  # a type that is imported for type checkers alone
        hints = {}
    return {parameter.name: _in_yaml(hints.get(parameter.name, Any)) for parameter in parameters}


def _in_yaml(annotation: Any) -> Any:
    """The type of what YAML can hold for an annotation: a group of options for an object; Any is not checked."""
    origin = get_origin(annotation)
    if annotation in PLAIN or origin is Literal:
        return annotation
    inner = tuple(argument if argument is ... else _in_yaml(argument) for argument in get_args(annotation))
    if origin in (Union, UnionType):
        return Union[inner]  # noqa: UP007
    if isinstance(origin, type) and issubclass(origin, (Mapping, Sequence)):
        return origin[inner]  # type: ignore[index]
    described = is_dataclass(annotation) or getattr(annotation, "_is_protocol", False)
    return Mapping if described and annotation is not Any else Any


def check_value(path: str, value: Any, annotation: Any) -> None:
    """Raises UserError unless the value is of the type, naming what is wrong inside a mapping or a list."""
    try:
        _adapter(annotation).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        errors = error.errors()
        null = ["null"] if NoneType in get_args(annotation) else []
        steps: Any = errors[0]["loc"]  # into mappings and lists, and then into the alternatives of a union
        for step in steps:
            if not isinstance(value, list | dict) or (isinstance(value, dict) and step not in value):
                break
            errors = [problem for problem in errors if step in problem["loc"]]
            path, value, null = f"{path}.{step}", value[step], []
        messages = [problem["msg"].removeprefix("Input should be ") for problem in errors]
        right = list(dict.fromkeys([*messages, *null]))
        forms = [SPELLED[word] for word in right if word in SPELLED and not isinstance(value, list | dict)]
        advice = "".join(f" Write {shlex.quote(f'{path}={form.format(spelled(value))}')}." for form in forms)
        raise UserError(f"{path}={spelled(value)} cannot be used: it must be {' or '.join(right)}.{advice}") from error


def spelled(value: Any) -> str:
    """A value as a command line has it."""
    return value if isinstance(value, str) else json.dumps(value)


@lru_cache(maxsize=256)
def _adapter(annotation: Any) -> TypeAdapter:
    return TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False))


def _check_task(path: Sequence[str], values: Mapping[str, Any]) -> None:
    """Raises UserError for a task named on the command line, in a mapping by task, that the suite does not have."""
    suite = values.get("suite") or {}
    tasks = [*map(str, suite.get("tasks") or suite.get("sources") or ())]
    if ".".join(path[:2]) in BY_TASK and len(path) > 2 and path[2] not in tasks:
        raise UserError(f"{unknown(path[:3], tasks)} Those are the tasks of the suite.")
