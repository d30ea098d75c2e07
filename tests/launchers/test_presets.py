"""Presets of launchers and sweepers: each composes with its plugin, says to SLURM what it promises, and runs here."""

from pathlib import Path

import console
import pytest
from console import by_method
from hydra import compose, initialize_config_module
from hydra.utils import get_class
from omegaconf import OmegaConf

from launchers import rows
from launchers.cli_help import EXTRAS, installed, missing

FOLDER = Path(__file__).parents[2] / "conf" / "hydra"
PRESETS = {
    ("launcher", "processes"): "joblib",
    ("launcher", "ray_gpus"): "ray",
    ("launcher", "slurm"): "slurm",
    ("launcher", "slurm_gpu"): "slurm",
    ("sweeper", "pareto"): "optuna",
}


def needs(extra):
    if not installed(extra):
        pytest.skip(f"needs pip install -e '.[{extra}]'")


def composed(kind, name, *overrides):
    needs(PRESETS[kind, name])
    with initialize_config_module("conf", version_base="1.3"):
        return compose("config", [f"hydra/{kind}={name}", *overrides], return_hydra_config=True).hydra[kind]


def test_every_preset_is_known_here():
    assert {(path.parent.name, path.stem) for path in FOLDER.glob("*/*.yaml")} == set(PRESETS)


@pytest.mark.parametrize(("kind", "name"), PRESETS)
def test_a_preset_is_its_plugin_with_values_that_it_knows(kind, name):
    found = composed(kind, name)
    assert EXTRAS[PRESETS[kind, name]][0] in get_class(found._target_).__module__
    own = OmegaConf.load(FOLDER / kind / f"{name}.yaml")
    told = OmegaConf.masked_copy(own, [str(key) for key in own if key not in ("defaults", "sampler")])  # type: ignore
    assert len(told) and OmegaConf.merge(found, told) == found


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


@pytest.mark.parametrize(("kind", "name"), PRESETS)
def test_a_preset_without_its_plugin_says_what_to_install(kind, name, monkeypatch):
    extra = PRESETS[kind, name]
    monkeypatch.setattr("importlib.util.find_spec", lambda plugin: None)
    told = missing(["-m", f"hydra/{kind}={name}", "seed=0,1"])
    assert told == f"hydra/{kind}={name} needs a package that is not installed: pip install -e '.[{extra}]'."
    assert f'\n{extra} = ["hydra-' in (FOLDER.parents[1] / "pyproject.toml").read_text()
    assert missing(["experiment=seeds", "method=ties"]) is None
    assert "'.[optuna]'" in (missing(["experiment=pareto"]) or "")


def test_processes_share_a_sweep(output):
    needs("joblib")
    sweep = ["-m", "hydra/launcher=processes", "hydra.launcher.n_jobs=2", "method=average,ties"]
    process = console.duet(output, *sweep)
    assert process.returncode == 0, process.stderr
    assert set(by_method(output)) == {"base", "average", "ties", "expert"}


def test_ray_gives_every_job_a_gpu(output, monkeypatch):
    """Two made-up ones: on a CPU nothing uses them."""
    needs("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    process = console.duet(
        output, "-m", "hydra/launcher=ray_gpus", "hydra.launcher.ray.init.num_gpus=2", "method=average,ties"
    )
    assert process.returncode == 0, process.stderr
    assert set(by_method(output)) == {"base", "average", "ties", "expert"}
    assert "2 of 2 cells" in process.stderr


def test_optuna_is_told_both_objectives_and_its_failures(output):
    needs("optuna")
    keys = ["experiment=pareto", "hydra.sweeper.n_trials=4", "method.routes=ffn", "method.unit=matrix",
            "method@method.rest=task_arithmetic", "router=oracle", "method.ranks.in_value=null"]  # fmt: skip
    process = console.duet(output, *keys, "method.ranks.mode=budget", "method.ranks.value=choice(100000,1)")
    assert process.returncode == 1 and "Failed experiment" in process.stderr, process.stderr  # 1 number is no budget
    (folder,) = (output / "runs").iterdir()
    found = OmegaConf.load(folder / "optimization_results.yaml").solutions
    made = {row.method: row for row in rows.read(output / "results") if row.status == "ok"}  # 1 leaves its error
    duet, expert = made["duet"], made["expert"]
    norm = sum(duet.accuracy[task] / expert.accuracy[task] for task in duet.tasks) / len(duet.tasks)
    (values,) = {tuple(solution["values"]) for solution in found}
    assert values == (pytest.approx(norm), duet.stored_bytes)
