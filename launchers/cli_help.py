"""What a command line lacks: a package that a choice needs, or the right name of an option."""

import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra.errors import HydraException

import conf
from launchers.sweeps.axes import check_exists, composed, is_group, parsed
from merging.errors import UserError

EXTRAS = {
    "joblib": ("hydra_joblib_launcher", "launcher=processes", "launcher=joblib"),
    "slurm": ("hydra_submitit_launcher", "launcher=slurm", "launcher=slurm_gpu", "launcher=submitit_slurm"),
    "ray": ("hydra_ray_launcher", "launcher=ray_gpus", "launcher=ray"),
    "optuna": ("hydra_optuna_sweeper", "sweeper=pareto", "sweeper=optuna"),
}  # extra of pyproject -> Hydra's plugin, what needs it


def missing(arguments: Sequence[str]) -> str | None:
    """What to install for the launcher or sweeper of a command line, or of its experiment; None if it is there."""
    chosen = {argument.removeprefix("hydra/") for argument in [*arguments, *_of_experiments(arguments)]}
    for extra, (_, *users) in EXTRAS.items():
        needing = chosen & set(users)
        if needing and not installed(extra):
            return f"hydra/{needing.pop()} needs a package that is not installed: pip install -e '.[{extra}]'."
    return None


def installed(extra: str) -> bool:
    """Whether the plugin of an extra is there."""
    try:
        return importlib.util.find_spec(f"hydra_plugins.{EXTRAS[extra][0]}") is not None
    except ModuleNotFoundError:  # there is no plugin at all
        return False


def _of_experiments(arguments: Sequence[str]) -> Iterable[str]:
    """The launchers and sweepers that shipped experiments choose."""
    for name in (argument.removeprefix("experiment=") for argument in arguments if argument.startswith("experiment=")):
        file = Path(conf.__path__[0]) / "experiment" / f"{name}.yaml"
        for kind, choice in re.findall(r"override /hydra/(\w+): (\w+)", file.read_text() if file.exists() else ""):
            yield f"{kind}={choice}"


def hint(arguments: Sequence[str]) -> str | None:
    """For the first override whose key does not exist: what exists there, the nearest named. None if all exist.

    Of a sweep over a group its first choice is looked into.
    """
    try:
        overrides = parsed(argument for argument in arguments if not argument.startswith("-"))
        chosen = [override for override in overrides if is_group(override.key_or_group)]
        config = composed((override.input_line or "").split(",")[0] for override in chosen)
        for override in overrides:
            key = override.key_or_group
            if not (override.is_add() or override in chosen or "/" in key or key.startswith("hydra.")):
                check_exists(config, key)
    except HydraException:  # Hydra's own message says what it cannot read
        return None
    except UserError as error:
        return str(error)
    return None
