"""What a mistyped override could have meant."""

import difflib
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

import conf

GROUPS = {path.name for path in Path(conf.__path__[0]).iterdir() if path.is_dir()}


def hint(arguments: list[str]) -> str | None:
    """For the first override whose key does not exist: what exists there, nearest first. None if all exist."""
    try:
        overrides = OverridesParser.create().parse_overrides([each for each in arguments if not each.startswith("-")])
        config = _compose([each.input_line or "" for each in overrides if _chooses(each)])
    except HydraException:  # Hydra's own message lists the options of a group
        return None
    for each in overrides:
        key = each.key_or_group
        if each.is_add() or _chooses(each) or "/" in key or key.split(".")[0] == "hydra":
            continue
        path, config_part = [], config
        for name in key.split("."):
            if isinstance(config_part, DictConfig) and name not in config_part:
                return _message(".".join([*path, name]), ".".join(path), name, [str(key) for key in config_part])
            config_part = OmegaConf.select(config_part, name) if isinstance(config_part, DictConfig) else None
            path.append(name)
    return None


def _chooses(override: Override) -> bool:
    """Whether it chooses a file of conf/, which need not leave a key: an experiment has none."""
    return override.key_or_group.split("@")[0] in GROUPS


def _compose(choices: list[str]) -> DictConfig:
    """The configuration with these choices of groups; of a sweep over a group, its first choice."""
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", [choice.split(",")[0] for choice in choices])


def _message(full: str, parent: str, name: str, known: list[str]) -> str:
    shown = [key for key in known if not key.startswith("_")]
    near = difflib.get_close_matches(name, shown, 1)
    guess = f" Did you mean {near[0]}?" if near else ""
    return f"There is no {full}.{guess} {parent or 'The configuration'} has: {', '.join(shown)}."
