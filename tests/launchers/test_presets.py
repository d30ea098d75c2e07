"""Presets of launchers and sweepers: each composes with its plugin, says to SLURM what it promises, and runs here."""

import importlib.util
from pathlib import Path

import console
import pytest
from console import by_method
from hydra import compose, initialize_config_module
from hydra.utils import get_class
from omegaconf import OmegaConf

FOLDER = Path(__file__).parents[2] / "conf" / "hydra"
PLUGINS = {"joblib": "hydra_joblib_launcher", "slurm": "hydra_submitit_launcher", "optuna": "hydra_optuna_sweeper"}
PRESETS = {
    ("launcher", "processes"): "joblib",
    ("launcher", "slurm"): "slurm",
    ("launcher", "slurm_gpu"): "slurm",
    ("sweeper", "pareto"): "optuna",
}


def needs(extra):
    if importlib.util.find_spec(f"hydra_plugins.{PLUGINS[extra]}") is None:
        pytest.skip(f"needs pip install 'duet-merging[{extra}]'")


def composed(kind, name, *overrides):
    needs(PRESETS[kind, name])
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", [f"hydra/{kind}={name}", *overrides], return_hydra_config=True).hydra[kind]


def test_every_preset_is_known_here():
    assert {(path.parent.name, path.stem) for path in FOLDER.glob("*/*.yaml")} == set(PRESETS)


@pytest.mark.parametrize(("kind", "name"), PRESETS)
def test_a_preset_is_its_plugin_with_values_that_it_knows(kind, name):
    found = composed(kind, name)
    assert PLUGINS[PRESETS[kind, name]] in get_class(found._target_).__module__
    own = OmegaConf.load(FOLDER / kind / f"{name}.yaml")
    set_here = [str(key) for key in own if key not in ("defaults", "sampler")]
    assert set_here and {key: str(found[key]) for key in set_here} == {key: str(own[key]) for key in set_here}


@pytest.mark.parametrize(("name", "gpus"), [("slurm", False), ("slurm_gpu", True)])
def test_slurm_is_told_array_time_gpus_and_requeue(name, gpus, tmp_path):
    preset = composed("launcher", name, "hydra.launcher.array_parallelism=3", "hydra.launcher.timeout_min=90")
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    told = {key: value for key, value in OmegaConf.to_container(preset).items()
            if key not in ("_target_", "submitit_folder", "max_num_timeout", "timeout_min", "name", "tasks_per_node",
                           "mem_gb") and value is not None}  # fmt: skip
    told |= {"time": preset.timeout_min, "ntasks_per_node": preset.tasks_per_node, "job_name": preset.name}
    assert set(told) <= set(SlurmExecutor._valid_parameters())
    lines = _make_sbatch_string("true", tmp_path, map_count=8, **told).splitlines()
    assert {"#SBATCH --array=0-7%3", "#SBATCH --time=90", "#SBATCH --requeue", "#SBATCH --job-name=duet",
            "#SBATCH --cpus-per-task=8", "#SBATCH --signal=USR2@120"} <= set(lines)  # fmt: skip
    assert ("#SBATCH --gpus-per-node=1" in lines) == gpus and preset.max_num_timeout > 0


def test_processes_share_a_sweep(output):
    needs("joblib")
    sweep = ["-m", "hydra/launcher=processes", "hydra.launcher.n_jobs=2", "method=average,ties"]
    process = console.duet(output, *sweep)
    assert process.returncode == 0, process.stderr
    assert set(by_method(output)) == {"base", "average", "ties", "expert"}


def test_optuna_is_told_both_objectives_and_its_failures(output):
    needs("optuna")
    keys = ["experiment=pareto", "hydra.sweeper.n_trials=4", "method.routes=ffn", "method.unit=matrix",
            "method@method.rest=task_arithmetic", "router=oracle", "method.ranks.in_value=null"]  # fmt: skip
    process = console.duet(output, *keys, "method.ranks.value=choice(0.125,7)")
    assert process.returncode == 1 and "Failed experiment" in process.stderr, process.stderr  # shares lie from 0 to 1
    (folder,) = (output / "runs").iterdir()
    found = OmegaConf.load(folder / "optimization_results.yaml").solutions
    rows = by_method(output)
    duet, expert = rows["duet"], rows["expert"]
    norm = sum(duet.accuracy[task] / expert.accuracy[task] for task in duet.tasks) / len(duet.tasks)
    (values,) = {tuple(solution["values"]) for solution in found}
    assert values == (pytest.approx(norm), duet.stored_bytes)
