"""Every experiment file is checked before it runs, and becomes a W&B sweep of the same cells."""

import random
import re
from collections import Counter
from pathlib import Path

import pytest
import wandb
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from launchers.sweeps import __main__ as command
from launchers.sweeps import agents
from launchers.sweeps.axes import Sweep, composed, read
from launchers.sweeps.check import check, problem
from merging.errors import UserError

FOLDER = Path(__file__).parents[2] / "conf" / "experiment"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TEXTS = {name: (FOLDER / f"{name}.yaml").read_text() for name in FILES}
CLIP = ["experts=hub_a", "suite=clip8"]


def needs_plugin(name):
    """Skips an experiment whose sweeper is not installed."""
    if "/hydra/sweeper: pareto" in TEXTS[name]:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install hydra-optuna-sweeper")


@pytest.fixture
def experiment(tmp_path):
    """Writes an experiment file outside the repository: (its text) -> the overrides that choose it."""

    def write(text):
        (tmp_path / "experiment").mkdir(exist_ok=True)
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
        return [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]

    return write


@pytest.mark.parametrize("name", FILES)
def test_every_key_of_an_experiment_exists_and_every_value_builds(name):
    needs_plugin(name)
    assert check(read([f"experiment={name}"])) > 1


@pytest.mark.parametrize(
    "name",
    [name for name in FILES if not re.search(r"override /(suite|experts)|\$\{suite\.name\}", TEXTS[name])],
)
def test_it_runs_on_clip_too(name):
    needs_plugin(name)
    assert check(read([f"experiment={name}", *CLIP])) > 1


@pytest.mark.parametrize("name", FILES)
def test_an_experiment_says_what_it_is_and_is_a_sweep(name):
    text = TEXTS[name]
    head = text.split("defaults:")[0].split("hydra:")[0]
    assert head.startswith("# @package _global_\n# ") and len(head.splitlines()) >= 2
    others = {f"- {other}" for other in FILES}
    inherits = any(line.strip() in others for line in text.splitlines())
    assert inherits or yaml.safe_load(text)["hydra"]["mode"] == "MULTIRUN"
    assert max(map(len, text.splitlines())) <= 150
    if "# Axes:" in head:
        axes = head.split("# Axes: ")[1].split("Draws:")[0]
        assert all(key.split(".")[-1].split("@")[-1].split("_")[0] in axes or "both ranks" in axes
                   for key in yaml.safe_load(text)["hydra"]["sweeper"]["params"])  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_what_an_experiment_sets_is_set(name):
    needs_plugin(name)
    config = OmegaConf.to_container(composed([f"experiment={name}"]), resolve=False)
    for part, changes in yaml.safe_load(TEXTS[name]).items():
        if part not in ("defaults", "hydra"):
            assert merged(config[part], changes) == config[part]


def merged(value, changes):
    """`value` with what an experiment says of it."""
    if not isinstance(changes, dict):
        return changes
    return value | {key: merged(value[key], change) for key, change in changes.items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "hydra: {sweeper: {params: {method: duet, method.ranks.vaule: '0.1,1'}}}",
            "no method.ranks.vaule. Did you mean value?",
        ),
        ("hydra: {sweeper: {params: {method: 'duet,tise'}}}", "no method=tise. Did you mean ties?"),
        ("hydra: {sweeper: {params: {sede: '0,1'}}}", "no sede. Did you mean seed?"),
        ("sede: 1", "no sede. Did you mean seed?"),
        (
            "defaults: [{override /method: duet}]\nmethod: {ranks: {vaule: 3}}",
            "no method.ranks.vaule. Did you mean value?",
        ),
        ("hydra: {sweeper: {params: {method: 'duet,ties', method.density: '0.1,1'}}}", "There is no method.density."),
        ("hydra: {sweeper: {params: {method: twin, method.sparsify: 'svd,sdv'}}}", "sparsify=sdv cannot be used"),
        ("hydra: {sweeper: {params: {suite.tasks: '[cars],[karts]'}}}", "no task 'karts'"),
    ],
)
def test_a_wrong_name_is_told_before_anything_runs(text, message, experiment):
    overrides = experiment(text)
    with pytest.raises(UserError) as error:
        check(read(overrides))
    assert message in str(error.value)
    assert problem(["-m", *overrides]) == str(error.value)


def test_what_is_right_or_not_ours_has_no_problem(experiment):
    meant = experiment("size: 0.1\nmethod: {scale: '${size}'}\nhydra: {sweeper: {params: {size: '0.1,0.2'}}}")
    assert problem(meant) is None
    assert problem(["experiment=tsak_rank", "--config-dir", "elsewhere"]) is None
    assert problem(["method=tise"]) is None and problem([]) is None and problem(["seed=[1", "experiment=seeds"]) is None
    assert "Did you mean task_rank?" in (problem(["experiment=tsak_rank"]) or "")


def test_the_command_line_wins_over_the_experiment():
    plain, changed = read(["experiment=task_rank"]), read(["experiment=task_rank", "seed=7", "method.ranks.task=8,4"])
    assert plain.axes["seed"] == ("0", "1") and len(plain.axes["method.ranks.task"]) == 8
    assert changed == Sweep(("experiment=task_rank", "seed=7"), {"method.ranks.task": ("8", "4")})
    assert (check(plain), check(changed)) == (16, 2)


@pytest.mark.parametrize("suite", ["mini8", "clip8"])
def test_every_task_is_equally_often_among_the_first(suite):
    config = composed(["experiment=task_count", f"suite={suite}"]).copy()
    every = instantiate(composed([f"suite={suite}"]).suite.tasks)
    counts = {2: "two", 4: "four", 6: "six", 8: "eight"}

    def first(n, order):
        config.count, config.order = counts[n], order
        return list(config.suite.tasks)

    chosen = {(n, order): first(n, order) for n in counts for order in "abcd"}
    start = random.Random(0).sample(list(every), 8)
    assert chosen[6, "a"] == start[:6] and chosen[4, "b"] == start[2:6]
    assert chosen[8, "d"] == chosen[8, "a"] == start
    for n in (2, 4, 6):
        often = Counter(task for order in "abcd" for task in chosen[n, order])
        assert often == dict.fromkeys(every, n // 2) and all(
            chosen[n, order] == chosen[n, order][:n] for order in "abcd"
        )


@pytest.mark.parametrize("name", ["mini8_routers", "ranks_per_mode", "task_count", "task_rank", "twin_sparsity"])
def test_an_experiment_is_a_wandb_sweep_of_the_same_cells(name):
    sweep = read(agents.tracked([f"experiment={name}"]))
    made = yaml.safe_load(agents.text(sweep, agents.definition(sweep)))

    assert {key: len(values) for key, values in sweep.axes.items()} == {
        key: len(parameter["values"]) for key, parameter in made["parameters"].items()
    }
    assert all(isinstance(value, (str, int, float)) for part in made["parameters"].values() for value in part["values"])
    assert made["command"][:2] == ["${env}", "${program}"] and made["command"][-1] == "${args_no_hyphens}"
    arguments = [f"{key}={part['values'][-1]}" for key, part in made["parameters"].items()]
    fixed = [argument for argument in made["command"][2:-1] if not argument.startswith("hydra.")]
    job = composed([*fixed, *arguments])
    meant = composed([f"experiment={name}", *(f"{key}={values[-1]}" for key, values in sweep.axes.items())])
    assert job.tracker.group == name and made["project"] == job.tracker.project
    assert {key: part for key, part in job.items() if key not in ("tracker", "hydra")} == {
        key: part for key, part in meant.items() if key not in ("tracker", "hydra")
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=ties", "suite.tasks=[cars],[cars,digits]"], "W&B cannot sweep suite.tasks=[cars]"),
        (["method=ties", "method.density=interval(0.1,0.9)"], "A grid has no intervals"),
        (["method=ties"], "nothing to sweep"),
        (["experiment=twin_shared"], "W&B cannot sweep method@method.shared: it takes names of letters"),
        (["tracker=none", "seed=0,1"], "need the W&B tracker"),
        (["experiment=seeds", "method.densty=0.1,0.2"], "There is no method.densty"),
    ],
)
def test_what_cannot_be_a_wandb_sweep_is_refused(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="error: ") as stop:
        command.main(["wandb", *overrides])
    assert message in str(stop.value) and not list(tmp_path.iterdir())


def test_null_and_intervals_reach_wandb():
    sweep = read(agents.tracked(["method=twin", "method.rank=null,4", "method.keep=interval(0.1,0.5)"]))
    made = agents.definition(sweep, "bayes")
    assert made["parameters"] == {"method.rank": {"values": ["null", 4]}, "method.keep": {"min": 0.1, "max": 0.5}}
    assert made["metric"] == {"name": "accuracy/norm", "goal": "maximize"} and made["name"] == "sweep"


def test_the_command_checks_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command.main(["check", "experiment=granularity"])
    assert capsys.readouterr().out.splitlines() == [
        "seed: 0, 1", "router.gate.granularity: sample, token, batch, mixed", "8 cells"
    ]  # fmt: skip
    command.main(["wandb", "experiment=granularity", "tracker.project=mine"])
    assert yaml.safe_load((tmp_path / "granularity.sweep.yaml").read_text())["project"] == "mine"


def test_a_server_that_is_not_there_is_told_in_a_paragraph(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"BASE_URL": "http://127.0.0.1:9", "API_KEY": "0" * 40, "HTTP_TIMEOUT": "1"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # its client reads the environment once
    with pytest.raises(SystemExit, match=r"http.*:9 did not take the sweep: .*register the file later: wandb"):
        command.main(["wandb", "--register", "experiment=granularity"])
    assert (tmp_path / "granularity.sweep.yaml").exists()
