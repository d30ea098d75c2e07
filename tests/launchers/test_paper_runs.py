"""The experiments of the papers' language tables to their end: real names, layouts and columns, tiny models."""

import console
import decoders
import glue_copies
import pytest
import t5_copies
from console import by_method
from hub import Hub

from launchers.results.against import compare
from launchers.sweeps.axes import composed, read

pytest.importorskip("transformers")
pytest.importorskip("lm_eval", reason="pip install 'duet-merging[llm]'")
UNSEEN = ["experts=glue_roberta", "suite=glue8", "suite.first=1001", "router=twin", "scale=fixed"]
MERGES = "average,task_arithmetic_glue,ties_glue,dare_glue,dare_ties_glue,twin_glue_rank1,twin_glue"
RUNS = {  # experiment: options; base and experts come with every method, and what one before it runs alike is left out
    "twin_table2_glue": [f"method={MERGES}"],
    "twin_table8": ["method=twin_glue"],
    "twin_table6": ["method=twin_glue_single,twin_glue_pretrain"],
    "twin_table5": [*UNSEEN, "method=dare_ties_glue,twin_glue"],
    "twin_figure4": ["count=two", "method=average,twin_glue"],
    "twin_figure6": ["method.keep=0.5", "method.sparsify=magnitude,dropout"],
    "t5_glue8_static": ["method=average,task_arithmetic,ties,dare,tsv_m,iso_c"],
    "t5_glue8_lora": ["method=ties,tsv_m"],
    "twin_table2_qwen": ["method=average,task_arithmetic,dare_qwen,ties_qwen,dare_ties_qwen,twin_qwen_rank1,twin_qwen"],
    "twin_table4": ["method=task_arithmetic,twin_qwen"],
    "twin_table7": ["method=twin_qwen"],
}
WHOLE = ("twin_table2_glue", "t5_glue8_static", "twin_table2_qwen")
ROBERTA, T5, QWEN = [*RUNS][:6], [*RUNS][6:8], [*RUNS][8:]
FEW = ["engine.device=cpu", "hydra.callbacks.report.live=false"]
GLUE = ["suite.val=3", "suite.calibration=4", "suite.first=5"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A hub with GLUE and its experts, beside it the tokenizers, and what all runs write."""
    folder = tmp_path_factory.mktemp("papers")
    with Hub(folder / "served") as hub:
        glue_copies.serve(hub)
        t5_copies.serve(hub)
        for name, content in glue_copies.tokenizer().items():
            (folder / "roberta").mkdir(exist_ok=True)
            (folder / "roberta" / name).write_bytes(content)
        t5_copies.tokenizer(folder / "t5")
        (folder / "tasks").mkdir()
        decoders.write_tasks(folder / "tasks")
        decoders.write_models(folder)
        yield hub, folder


@pytest.fixture
def run(served, tmp_path, monkeypatch, duet_here):
    """Runs an experiment with options; returns rows, what was printed and what was logged."""
    hub, folder = served
    hub.here(monkeypatch, tmp_path / "hf")
    monkeypatch.setattr(console, "TINY", [])

    def call(experiment, output, *options):
        status, page, errors = duet_here(folder / output, f"experiment={experiment}", *RUNS[experiment], *FEW, *options)
        assert status == 0, errors
        rows = by_method(folder / output)
        methods = read([f"experiment={experiment}", *RUNS[experiment]]).axes.get("method", ())
        if experiment in WHOLE:
            assert set(rows) == set(read([f"experiment={experiment}"]).axes["method"])
        assert {"base", "expert", *methods} <= set(rows) and {row.status for row in rows.values()} == {"ok"}
        assert all(method in page for method in methods)
        return rows, errors

    return call


def sized(sizes):
    return [f"++backbone.config.{name}={value}" for name, value in sizes.items()]


@pytest.mark.parametrize("experiment", ROBERTA)
def test_on_roberta(experiment, run, served):
    options = [*GLUE, *sized(glue_copies.SIZES), f"backbone.tokenizer={served[1] / 'roberta'}"]
    options += ["backbone.length=12", "router.train.steps=2"]
    rows, log = run(experiment, "roberta", *options)
    assert "to download" in log and "samples a second" in log
    if experiment in ("twin_table2_glue", "twin_table6"):
        assert {row.owned for row in rows.values()} == {"heads+biases"}


@pytest.mark.parametrize("experiment", T5)
def test_on_t5(experiment, run, served):
    options = [
        *GLUE,
        *sized({**t5_copies.SIZES, "num_decoder_layers": 2}),
        f"backbone.tokenizer={served[1] / 't5'}",
        "backbone.length=64",
    ]
    rows, log = run(experiment, experiment, *options)
    assert "to download" in log and "at least" in log
    assert {row.scores["stsb"].metric for row in rows.values()} == {"spearman"}
    beside = [there for there in compare([rows["ties"]]) if there.published is not None]
    alike = [there for there in beside if "experts of" not in " ".join(there.reasons)]
    assert (
        {there.published.family for there in alike}
        == {rows["ties"].family}
        != {there.published.family for there in beside}
    )
    assert all("other test samples" in " ".join(there.reasons) for there in alike)


@pytest.mark.parametrize("experiment", QWEN)
def test_on_a_decoder(experiment, run, served, monkeypatch):
    folder = served[1]
    options = [*decoders.OPTIONS, f"suite.include_path={folder / 'tasks'}", f"experts.base={folder / 'base'}"]
    options += [f"experts.experts='{folder}/{{task}}'", f"backbone.tokenizer={folder / 'base'}", "backbone.length=48"]
    options += ["router.train.steps=2"]
    if experiment != "twin_table4":
        options += ["suite.metrics.cnn_dailymail_abisee=exact_match", "suite.reserve.cnn_dailymail_abisee=0.5"]
    monkeypatch.setattr("launchers.preflight.GB", 1e3)
    rows, log = run(experiment, experiment, *options)
    assert "one model has" in log and "tokens of test" in log
    assert rows["twin_qwen"].router == "twin" and rows["twin_qwen"].opened == {"calibration": ["router=twin"]}
    assert list(rows["expert"].scores) == list(composed([f"experiment={experiment}"]).suite.tasks)


def test_rows_of_one_experiment_are_those_of_another():
    two, eight = (composed([f"experiment=twin_table{number}"]) for number in ("2_glue", "8"))
    assert {key: value for key, value in two.items() if key != "hydra"} == {
        key: value for key, value in eight.items() if key != "hydra"
    } and two.hydra.sweeper == eight.hydra.sweeper
