"""The examples of docs/adding-a-method.md on metrics and tasks, as written."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from merging.errors import UserError
from tasks import metrics

GUIDE = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text("utf-8")
METRIC, TASK = (GUIDE.partition(f"# Adding a {what}")[2].partition("\n# ")[0] for what in ("metric", "task"))


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_a_metric_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "mse.py").write_text(blocks(METRIC, "python")[0], "utf-8")
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    metrics.metrics.cache_clear()
    try:
        score = metrics.measure(["mse", "pearson"], "any", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        assert (score.value, score.higher_is_better, set(score.parts)) == (2.0, False, {"pearson"})
        with pytest.raises(UserError, match="mse is not defined for the task any: it compares numbers"):
            metrics.measure(["mse"], "any", torch.tensor([1]), torch.tensor([1]))
    finally:
        metrics.metrics.cache_clear()


def test_a_suite_of_folders_is_one_yaml(tmp_path):
    facts = yaml.safe_load(blocks(TASK, "yaml")[0])
    assert facts.pop("defaults") == ["folder", "_self_"]
    source = facts["sources"]["pets"]
    overrides = [f"suite.name={facts['name']}", f"suite.sources.pets.folder={source['folder']}",
                 f"+suite.sources.pets.metrics=[{','.join(source['metrics'])}]"]  # fmt: skip
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", ["suite=folder", "backbone=clip_vit_b32", f"output={tmp_path}", *overrides])
    assert instantiate(config.suite).tasks[0].metrics == ("f1_macro", "accuracy")


def test_tasks_of_several_metrics_are_scored():
    pytest.importorskip("transformers")
    names: dict = {}
    exec(blocks(TASK, "python")[0], names)
    assert [score.metric for score in names["scores"].values()] == ["matthews", "accuracy", "pearson"]
