"""The experiments on GLUE as a user runs them, on miniature copies that a loopback hub serves."""

import console
import pytest
from console import by_method
from glue_copies import LABELS, SIZES, serve, tokenizer
from hub import Hub

from launchers.results.against import compare

pytest.importorskip("transformers")
SMALL = [f"++backbone.config.{name}={value}" for name, value in SIZES.items()]
SMALL += ["backbone.length=12", "suite.val=3", "suite.calibration=4", "engine.device=cpu"]


@pytest.fixture
def duet_on_glue(tmp_path, monkeypatch, duet_here):
    """Runs `duet` where the Hub has GLUE, RoBERTa and its experts; rows by method."""
    with Hub(tmp_path / "served") as hub:
        hub.here(monkeypatch, tmp_path / "hf")
        monkeypatch.setattr(console, "TINY", [])
        serve(hub)
        for name, content in tokenizer().items():
            (tmp_path / name).write_bytes(content)

        def call(*arguments):
            status, page, errors = duet_here(tmp_path / "out", *SMALL, f"backbone.tokenizer={tmp_path}", *arguments)
            assert status == 0, errors
            return by_method(tmp_path / "out"), page, errors

        yield call


def test_twins_table_by_its_protocol(duet_on_glue):
    rows, page, errors = duet_on_glue("experiment=twin_table2_glue", "method=ties_glue,twin_glue", "suite.first=5",
                                      "router.train.steps=2")  # fmt: skip
    assert rows.keys() == {"base", "ties_glue", "twin_glue", "expert"}
    assert "to download" in errors and "test samples" in errors and "owned=heads+biases" in page
    for row in rows.values():
        assert row.owned == "heads+biases" and row.config["suite"]["first"] == 5
        assert {name: split["size"] for name, split in row.splits.items()} == dict.fromkeys(LABELS, 5)
        assert row.scores["cola"].metric == "matthews" and {*row.scores["mrpc"].parts} == {"accuracy", "f1"}
    assert rows["twin_glue"].router == "twin" and rows["twin_glue"].opened == {"calibration": ["router=twin"]}
    told = [other for other in compare([*rows.values()]) if other.published is not None]
    assert {other.published.table for other in told} >= {"Twin-Merging, Table 8", "Twin-Merging README", "WUDI logs"}
    assert all("other test samples" in " ".join(other.reasons) for other in told)


def test_another_protocol_is_another_experiment(duet_on_glue):
    rows, _, _ = duet_on_glue("experiment=twin_table2_glue", "method=task_arithmetic_glue", "experts.owned=heads",
                              "suite.first=null")  # fmt: skip
    told = [other for other in compare([rows["task_arithmetic_glue"]]) if other.published is not None]
    assert told and all("experts.owned heads+biases / heads" in " ".join(other.reasons) for other in told)


def test_tasks_whose_experts_are_left_out(duet_on_glue):
    rows, page, _ = duet_on_glue("experiment=twin_table5", "experts=glue_roberta", "suite=glue8", "router=twin",
                                 "suite.tasks=[cola,qnli,rte,mnli,sst2]", "experts.owned=heads+biases",
                                 "method=task_arithmetic_glue", "scale=fixed")  # fmt: skip
    row = rows["task_arithmetic_glue"]
    assert row.tasks == ["cola", "sst2"] and row.unseen.keys() == {"qnli", "mnli", "rte"} and "unseen" in page
    assert all(score is not None for score in (*row.unseen.values(), *rows["expert"].unseen.values()))
