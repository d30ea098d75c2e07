"""Presets that need a package more than a plain installation has."""

import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import conf

EXTRAS = {
    "joblib": ("hydra_joblib_launcher", "launcher=processes", "launcher=joblib"),
    "slurm": ("hydra_submitit_launcher", "launcher=slurm", "launcher=slurm_gpu", "launcher=submitit_slurm"),
    "ray": ("hydra_ray_launcher", "launcher=ray_gpus", "launcher=ray"),
    "optuna": ("hydra_optuna_sweeper", "sweeper=pareto", "sweeper=optuna"),
}  # extra of pyproject -> Hydra's plugin, what needs it


def missing(arguments: Sequence[str]) -> str | None:
    """What to install for the launcher or sweeper of a command line, or of its experiment; None if it is there."""
    chosen = {each.removeprefix("hydra/") for each in [*arguments, *_of_experiments(arguments)]}
    for extra, (_, *users) in EXTRAS.items():
        wanted = chosen & set(users)
        if wanted and not installed(extra):
            return f"hydra/{wanted.pop()} needs a package that is not installed: pip install -e '.[{extra}]'."
    return None


def installed(extra: str) -> bool:
    """Whether the plugin of an extra is there."""
    try:
        return importlib.util.find_spec(f"hydra_plugins.{EXTRAS[extra][0]}") is not None
    except ModuleNotFoundError:  # there is no plugin at all
        return False


def _of_experiments(arguments: Sequence[str]) -> Iterable[str]:
    """The launchers and sweepers that shipped experiments choose."""
    for name in (each.removeprefix("experiment=") for each in arguments if each.startswith("experiment=")):
        file = Path(conf.__path__[0]) / "experiment" / f"{name}.yaml"
        for kind, choice in re.findall(r"override /hydra/(\w+): (\w+)", file.read_text() if file.exists() else ""):
            yield f"{kind}={choice}"
