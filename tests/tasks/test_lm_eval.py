"""Tasks of lm-eval: merged models score what lm-eval gives them, and gates see prompts alone."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="pip install 'duet-merging[llm]'")

import harness_tasks as tiny
from lm_eval import simple_evaluate, tasks
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from merging.context import Context
from merging.errors import UserError
from merging.fit.gates import Learned, TaskId
from merging.methods import Average, Expert, Ties, Twin
from merging.routing.gates import GateShape, listening
from merging.routing.install import install
from tasks.data import SuiteData
from tasks.engine import Engine
from tasks.evaluate import Grid
from tasks.journal import Journal
from tasks.lm_eval.harness import requests
from tasks.lm_eval.model import answerer
from tasks.lm_eval.suite import build
from tasks.scales import Search

CONF = Path(__file__).parents[2] / "conf/suite"
SIZES = {"calibration": 8, "val": 8}
TWIN = Twin(keep=0.5)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """lm-eval's own runs without a description of the machine, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny.backbone(tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def suite(folder, *tasks, **options):
    return build("lm_eval", tasks, SIZES, include_path=folder, **options)


def by_lm_eval(module, backbone, folder, task, **options):
    """lm-eval's own results."""
    model = HFLM(pretrained=module, tokenizer=backbone._tokenizer, batch_size=3, max_length=backbone.length)
    manager = TaskManager(include_path=folder, include_defaults=False)
    results = simple_evaluate(
        model, tasks=[task], task_manager=manager, bootstrap_iters=1000, log_samples=False, **options
    )
    return results["results"][task]


def folded(backbone, merged, w=None):
    module = backbone.build()
    module.load_state_dict(dict(merged.state(w)), strict=False)
    return module


@pytest.mark.parametrize("options", [{}, {"num_fewshot": 1, "limit": 9}], ids=["plain", "shots and limit"])
def test_a_static_merge_scores_what_lm_eval_says(folder, backbone, options):
    tasks = ("colours", "shades", "writes", "weighs")
    merged = Average()(tiny.experts(tasks))
    scored = Grid(suite(folder, *tasks, **options), backbone, Engine("cpu", batch=5)).score(merged, "test").scores
    module = folded(backbone, merged)
    for task, metric in zip(tasks, ("acc", "acc", "exact_match", "word_perplexity"), strict=True):
        expected = by_lm_eval(module, backbone, folder, task, **options)
        assert scored[task].metric == metric and scored[task].count == options.get("limit", 14)
        assert scored[task].value == expected[f"{metric},none"]
        if task != "weighs":  # lm-eval has no standard error of it
            assert scored[task].standard_error == pytest.approx(expected[f"{metric}_stderr,none"])
    expected = by_lm_eval(module, backbone, folder, "colours", **options)
    assert scored["colours"].parts == {"acc_norm": expected["acc_norm,none"]}
    assert scored["weighs"].standard_error > 0 and not scored["weighs"].higher_is_better


@pytest.mark.parametrize("task", ["colours", "writes"])
def test_oracle_routing_scores_as_the_folded_experts(folder, backbone, task):
    tasks = (task, "shades")
    made = tiny.experts(tasks)
    grid = Grid(suite(folder, *tasks), backbone, Engine("cpu", batch=5))
    scores = [grid.score(method(made), "test").scores for method in (Twin(keep=1.0, start=None), Expert())]
    assert scores[0] == scores[1] != grid.score(Average()(made), "test").scores
    expected = by_lm_eval(folded(backbone, Expert()(made), torch.eye(2)[0]), backbone, folder, task)
    assert scores[0][task].value == expected[f"{scores[0][task].metric},none"]


def routed(folder, backbone, sees, tasks=("colours", "writes"), method=TWIN, **shape):
    """A suite, a merge with gates that tell prompts apart, and its weights for a prompt."""
    made, ours = tiny.experts(tasks), suite(folder, *tasks)
    router = Learned(gate=GateShape(sees=sees, **shape), train=TaskId(steps=2))
    merged, _ = router.fit(method(made), made, Context(SuiteData(ours, backbone)))
    for gate in merged.routing.gates:
        torch.nn.init.normal_(gate.net[-1].weight, std=1.0, generator=torch.Generator().manual_seed(1))
    return ours, merged


@pytest.mark.parametrize("sees", ["block", "early", "pass"])
def test_gates_see_the_prompt_and_nothing_else(folder, backbone, sees):
    ours, merged = routed(folder, backbone, sees)
    model, texts = install(backbone.build(), merged), backbone._tokenizer
    with torch.no_grad():
        for task in ours.tasks:
            asked = requests(task, "test")[:6]
            together = answerer(task.name, model, backbone, Engine("cpu", batch=7)).answers(asked)
            assert float(together["gating_weights"].std(0).max()) > 0.01
            for index, document in enumerate(asked):
                ids = torch.tensor([texts.encode(document[0].args[0])])
                with listening() as heard:
                    model(input_ids=ids)
                torch.testing.assert_close(together["gating_weights"][index], torch.stack(heard).mean(0)[0])
                for request, answer in zip(document, answers_of(together, index), strict=True):
                    if task.name == "writes":
                        written = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
                        assert texts.decode(written[0, ids.shape[1] :], skip_special_tokens=True).startswith(answer)
                    else:
                        assert answer[0] == pytest.approx(likelihood(model, heard, texts, request.args), abs=1e-4)


def likelihood(model, weights, texts, pair):
    """Log-likelihood of a continuation in one forward without a cache, under each gate's weights for its prompt."""
    start, whole = len(texts.encode(pair[0])), texts.encode("".join(pair))
    inputs, behind = torch.tensor([whole[:-1]]), torch.tensor(whole[start:])[:, None]
    given = lambda block, tokens: weights[block]  # noqa: E731
    out = model(input_ids=inputs, w=weights[0]) if len(weights) == 1 else model.observed(given, input_ids=inputs)
    return float(out.logits[0, start - 1 :].log_softmax(-1).gather(1, behind).sum())


def answers_of(kept, index):
    return json.loads(bytes(kept["answers"][index].tolist()).rstrip(b"\0"))


@pytest.mark.parametrize("index", [0, 1])
def test_gates_that_are_sure_of_a_task_answer_as_its_folded_expert(folder, backbone, index):
    ours, merged = routed(folder, backbone, "pass", method=Twin(keep=1.0, start=None))
    for gate in merged.routing.gates:
        torch.nn.init.zeros_(gate.net[-1].weight)
        gate.net[-1].bias.data = 200.0 * torch.eye(2)[index]
    expert = folded(backbone, Expert()(tiny.experts(ours.names)), torch.eye(2)[index])
    for task in ours.tasks:
        asked, engine = requests(task, "test"), Engine("cpu", batch=4)
        models = (install(backbone.build(), merged), expert)
        pair = [answerer(task.name, model, backbone, engine).answers(asked) for model in models]
        for document in range(len(asked)):
            (mine, theirs) = (answers_of(kept, document) for kept in pair)
            if task.name == "writes":
                assert mine == theirs
            else:
                assert [likely for likely, _ in mine] == pytest.approx([likely for likely, _ in theirs], abs=1e-4)
                assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]


def test_a_routed_grid_scores_and_says_where_prompts_went(folder, backbone, tmp_path):
    ours, merged = routed(folder, backbone, "early")
    scored = Grid(ours, backbone, Engine("cpu", batch=5)).score(merged, "test", journal=Journal(tmp_path))
    again = Grid(ours, backbone, Engine("cpu", batch=4)).score(merged, "test")
    assert scored.scores == again.scores and len(scored.routing.matrix) == 2
    assert [sum(row) for row in scored.routing.matrix] == pytest.approx([1, 1], abs=1e-5)


def test_a_coefficient_is_searched_on_documents_that_are_not_scored(folder, backbone):
    made, ours = tiny.experts(("colours", "writes")), suite(folder, "colours", "writes")
    chosen = Search([0.2, 0.9], "mean").choose(Ties()(made), grid := Grid(ours, backbone), lambda split: {})
    alone = [grid.score(Ties()(made).scaled(scale), "val").scores for scale in (0.2, 0.9)]
    assert chosen.validation == alone[[0.2, 0.9].index(chosen.merged.scale)]


def test_the_named_tasks_of_papers_are_there():
    listed = re.compile(r"^(?:task|group): *(\S+) *$", re.MULTILINE)
    known = {
        name for path in Path(tasks.__path__[0]).rglob("*.yaml") for name in listed.findall(path.read_text("utf-8"))
    }
    for path in CONF.glob("lm_eval*.yaml"):
        made = yaml.safe_load(path.read_text("utf-8"))
        named = {*made["tasks"], *made.get("held_out", ()), *made.get("metrics", ()), *made.get("reserve", ())}
        assert named <= known and {*made.get("held_out", ())} < {*made["tasks"]}


class TestDocuments:
    def test_splits_share_no_document_and_are_named_by_content(self, folder):
        (task,) = suite(folder, "colours", reserve={}).tasks
        texts = {split: task.split(split) for split in ("test", "val", "calibration")}
        assert {split: len(of) for split, of in texts.items()} == {"test": 14, "val": 8, "calibration": 8}
        other = suite(folder, "colours", num_fewshot=1).tasks[0]
        assert len({of.id for of in texts.values()} | {task.content("test"), other.content("test")}) == 4
        assert other.split("test").inputs[0].endswith(texts["test"].inputs[0])

    def test_set_aside_documents_are_not_scored(self, folder):
        (task,) = suite(folder, "alone", reserve={"alone": 0.5}).tasks
        whole = suite(folder, "alone").tasks[0].split("test").inputs.items
        aside = [*task.split("val").inputs.items, *task.split("calibration").inputs.items]
        assert task.split("test").inputs.items == whole[7:] and sorted(aside) == sorted(whole[:7])

    def test_a_group_has_the_score_of_lm_eval(self, folder, backbone):
        merged = Average()(tiny.experts(("both", "writes")))
        scored = Grid(suite(folder, "both", "writes"), backbone).score(merged, "test").scores["both"]
        model = HFLM(pretrained=folded(backbone, merged), tokenizer=backbone._tokenizer, max_length=48)
        manager = TaskManager(include_path=folder, include_defaults=False)
        expected = simple_evaluate(model, tasks=["colours", "shades"], task_manager=manager)["results"]
        assert scored.value == pytest.approx((expected["colours"]["acc,none"] + expected["shades"]["acc,none"]) / 2)
        assert scored.count == 28 and scored.metric == "acc" and 0 < scored.standard_error < 0.2

    def test_another_metric_may_be_the_score(self, folder, backbone):
        merged = Average()(tiny.experts(("colours", "shades")))
        ours = suite(folder, "colours", "shades", metrics={"colours": "acc_norm"})
        score = Grid(ours, backbone).score(merged, "test").scores["colours"]
        assert score.metric == "acc_norm" and list(score.parts) == ["acc"]


class TestBadInput:
    @pytest.mark.parametrize(
        ("tasks", "options", "message"),
        [
            ([], {}, r"suite\.tasks is empty"),
            (["every"], {}, r"every is a tag of several tasks"),
            (["colours"], {"include_path": "nowhere"}, "nowhere is no folder"),
            (["colours"], {"metrics": {"shades": "acc"}}, "names shades, no task of the suite: colours"),
            (["colours"], {"reserve": {"colours": 1.0}}, r"suite\.reserve\.colours=1\.0 is out of range"),
            (["colours"], {"limit": 0}, r"suite\.limit=0 is out of range"),
            (["colours"], {"sizes": {"val": 8}}, r"suite\.sizes\.calibration cannot be used"),
        ],
    )
    def test_is_refused_before_data_are_read(self, folder, backbone, tasks, options, message):
        with pytest.raises(UserError, match=message):
            ours = build(**{"name": "lm_eval", "tasks": tasks, "sizes": SIZES, "include_path": folder, **options})
            ours.tasks[0].check(backbone)

    def test_an_unknown_task_names_those_like_it(self, folder, backbone, monkeypatch):
        own = TaskManager(include_path=folder, include_defaults=False)  # scanning all takes seconds
        monkeypatch.setattr("tasks.lm_eval.harness.manager", lambda path, shipped: own)
        with pytest.raises(UserError, match=r"has no task colour\. Did you mean colours"):
            suite(folder, "colour").tasks[0].check(backbone)

    @pytest.mark.parametrize(
        ("task", "why"), [("samples", "it samples its answers"), ("runs", "executes what the model")]
    )
    def test_what_cannot_be_scored_says_why(self, folder, task, why):
        with pytest.raises(UserError, match=why):
            suite(folder, task).tasks[0].split("test")

    def test_splits_that_are_not_there(self, folder):
        (task,) = suite(folder, "alone").tasks
        with pytest.raises(UserError, match=r"alone has no documents for the split calibration.*suite\.reserve\.alone"):
            task.split("calibration")
        with pytest.raises(UserError, match="it has no split train"):
            task.split("train")

    def test_missing_data_and_metrics(self, folder, backbone, tmp_path):
        lines = "task: gone\ntest_split: test\noutput_type: generate_until\ndataset_path: json\n"
        (tmp_path / "gone.yaml").write_text(lines + "dataset_kwargs: {data_files: {test: gone.jsonl}}\n")
        with pytest.raises(UserError, match="lm-eval cannot open its task gone"):
            suite(str(tmp_path), "gone").tasks[0].split("test")
        grid = Grid(suite(folder, "colours", metrics={"colours": "bleu"}), backbone)
        with pytest.raises(
            UserError, match=r"suite\.metrics\.colours=bleu is no metric of it\. There are acc, acc_norm"
        ):
            grid.score(Average()(tiny.experts(("colours",))), "test")

    def test_gates_that_have_no_prompt(self, folder, backbone):
        ours, merged = routed(folder, backbone, "early", granularity="batch")
        with pytest.raises(UserError, match=r"granularity=batch gives no weights of one prompt"):
            Grid(ours, backbone).score(merged, "test")
        with pytest.raises(UserError, match="weighs weighs whole texts, without a prompt"):
            routed(folder, backbone, "early", ("weighs", "colours"))

    def test_prompts_longer_than_the_context(self, folder, backbone):
        short = replace(backbone, length=9)
        score = (
            Grid(suite(folder, "colours"), short).score(Average()(tiny.experts(("colours",))), "test").scores["colours"]
        )
        assert any("longer than the model" in note for note in score.notes)
        with pytest.raises(UserError, match=r"lm-eval cannot ask writes: .*backbone\.length=4"):
            Grid(suite(folder, "writes"), replace(backbone, length=4)).score(
                Average()(tiny.experts(("writes",))), "test"
            )
