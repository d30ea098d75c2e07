"""What a command line that is refused was meant to say: a package to install, an option's right name, quotes."""

import importlib.util
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

import conf
from launchers.sweeps.axes import composed, is_group, parsed, values_of
from merging.errors import UserError

EXTRAS = {
    "joblib": ("hydra_joblib_launcher", "launcher=processes", "launcher=joblib"),
    "slurm": ("hydra_submitit_launcher", "launcher=slurm", "launcher=slurm_gpu", "launcher=submitit_slurm"),
    "ray": ("hydra_ray_launcher", "launcher=ray_gpus", "launcher=ray"),
    "optuna": ("hydra_optuna_sweeper", "sweeper=pareto", "sweeper=optuna"),
}  # extra of pyproject -> Hydra's plugin, what needs it


def missing(arguments: Sequence[str]) -> str | None:
    """What to install for the launcher or sweeper of a command line, or of its experiment; None if it is there."""
    files = [Path(conf.__path__[0]) / "experiment" / f"{argument.removeprefix('experiment=')}.yaml"
             for argument in arguments if argument.startswith("experiment=")]  # fmt: skip
    text = "\n".join([*arguments, *(file.read_text() for file in files if file.exists())])
    chosen = {f"{kind}={name}" for kind, name in re.findall(r"hydra/(launcher|sweeper)(?:=|: )(\w+)", text)}
    for extra, (_, *users) in EXTRAS.items():
        if (needing := chosen & set(users)) and not installed(extra):
            return f"hydra/{needing.pop()} needs a package that is not installed: pip install -e '.[{extra}]'."
    return None


def installed(extra: str) -> bool:
    """Whether the plugin of an extra is there."""
    try:
        return importlib.util.find_spec(f"hydra_plugins.{EXTRAS[extra][0]}") is not None
    except ModuleNotFoundError:  # there is no plugin at all
        return False


def hint(arguments: Sequence[str]) -> str | None:
    """For the first override whose key or choice does not exist: what exists there, the nearest named; else None.

    Of a sweep its first values are looked into.
    """
    try:
        overrides = parsed(argument for argument in arguments if not argument.startswith("-"))
        composed(f"{override.get_key_element()}={values_of(override)[0]}" if override.is_sweep_override()
                 else override.input_line or "" for override in overrides)  # fmt: skip
    except UserError as error:
        return str(error)
    except HydraException:  # Hydra's own message says what it cannot read
        pass
    return None


def reaching(arguments: Sequence[str]) -> list[str]:
    """The command line, its options of a choice that is swept (method=ties,sce method.density=0.5) with ++ in front.

    Hydra looks for an option in the default choice first, which may not have it.
    """
    words = [*arguments]
    try:
        overrides = {word: parsed([word])[0] for word in words if not word.startswith("-")}
    except HydraException:  # Hydra says what it cannot read
        return words
    keys = {word: override.get_key_element() for word, override in overrides.items() if override.is_sweep_override()}
    swept = tuple(f"{key}." for key in keys.values() if is_group(key))
    inside = {word for word in overrides if word not in keys and word.startswith(swept)}
    return words if not inside or hint(words) is not None else [f"++{w}" if w in inside else w for w in words]


def spelled(arguments: Sequence[str], program: str = "duet") -> str | None:
    """The nearest command that Hydra can read, as a shell passes it on. None where it reads this one, or none is near.

    A comma outside of a sweep is explained by Hydra.
    """
    known, unknown = get_args_parser().parse_known_args(list(arguments))
    if dashed := [word for word in unknown if "=" in word]:
        fixed = [word.lstrip("-") if word in dashed else word for word in arguments]
        return f"Options have no dashes in front: {shlex.join([program, *fixed])}"
    whole: list[str] = []
    for word in known.overrides:
        if whole and "=" not in word and not word.startswith("~"):  # a space has ended the value
            whole[-1] += f" {word}"
        else:
            whole.append(word)
    halves = [word.partition("=") for word in whole]
    fixed = [f"{key}{sign}{text}" for key, sign, value in halves if (text := readable(value)) is not None]
    if fixed == known.overrides or len(fixed) < len(whole):
        return None
    flags = [word for word in arguments if word not in known.overrides]
    return f"A value with spaces or special characters needs quotes. Write: {shlex.join([program, *flags, *fixed])}"


def readable(value: str) -> str | None:
    """The value, in quotes where Hydra cannot read it as it stands; None for a list or mapping that it cannot read."""
    try:
        parsed([f"x={value}"])
    except HydraException:
        inside = value.startswith(("[", "{", '"', "'")) and not value.startswith("{task}")
        return None if inside else QuotedString(value, Quote.double).with_quotes()
    return value
