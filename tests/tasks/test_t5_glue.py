"""GLUE asked of Flan-T5: prompts and answers as published, and miniature copies of its experts on a loopback hub."""

from pathlib import Path

import pytest
import torch
import yaml
from glue_copies import PARTS, TEXTS, data, samples
from hub import Hub
from scipy import stats
from t5_copies import ADAPTED, SIZES, TASKS, adapter, model, serve, tokenizer

from merging import Cache
from merging.backbones.hugging_face import HuggingFace
from merging.methods import Expert, TaskArithmetic, Twin
from tasks.engine import Engine
from tasks.evaluate import Grid
from tasks.generation.t5_glue import build, facts
from tasks.generation.texts import decoded, encoded
from tasks.repositories import Repositories
from tasks.task import reading

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
FULL = Repositories("t5_glue", "google/flan-t5-base", "tanganke/flan-t5-base_glue-{task}", heads="suite")
LORA = Repositories("lora", "google/flan-t5-base", "tanganke/flan-t5-base_glue-{task}_lora-16", "", True, "suite")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return HuggingFace("flan_t5_base", "T5ForConditionalGeneration", {"model_type": "t5", **SIZES}, "mean", folder, 64)


@pytest.fixture
def served(tmp_path, monkeypatch):
    with Hub(tmp_path / "served") as hub:
        hub.here(monkeypatch, tmp_path / "hf")
        hub.add("nyu-mll/glue", data(), "datasets")
        serve(hub)
        yield hub


def test_prompts_and_answers_are_the_published_ones():
    filled = {
        task: facts()[task]["prompt"].format(**{column: column.upper() for column in TEXTS[task]}) for task in TASKS
    }
    assert filled["cola"] == (
        "Indicate if the following sentence is grammatically correct or not: \"SENTENCE\". Answere 'acceptable' or "
        "'unacceptable'."
    )
    assert filled["mnli"] == (
        "Does the premise: 'PREMISE' logically imply, contradict, or is neutral to the hypothesis: 'HYPOTHESIS'? "
        "Answere with 'entailment', 'contradiction', or 'neutral'."
    )
    assert filled["mrpc"] == (
        "Are the following sentences 'SENTENCE1' and 'SENTENCE2' conveying the same meaning? Answere with 'yes' or "
        "'no'."
    )
    assert filled["qnli"] == (
        "Given the context: 'SENTENCE', does the question 'QUESTION' have an answer based on the information provided? "
        "Answer with 'yes' or 'no'."
    )
    assert filled["qqp"] == (
        "Do the questions 'QUESTION1' and 'QUESTION2' have the same intent? Answere with 'yes' or 'no'."
    )
    assert filled["rte"] == "Does the text: 'SENTENCE1' entail that 'SENTENCE2' is true? Provide 'yes' or 'no'."
    assert filled["sst2"] == "Given the sentence 'SENTENCE', determine the sentiment. Is it positive or negative?"
    assert filled["stsb"] == (
        "Consider the sentences 'SENTENCE1' and 'SENTENCE2'. On a scale from 1 (completely different) to 5 (completely "
        "similar), rate the similarity."
    )
    assert {task: known["answers"] for task, known in facts().items()} == {
        "cola": ["unacceptable", "acceptable"], "mnli": ["entailment", "neutral", "contradiction"],
        "mrpc": ["no", "yes"], "qnli": ["yes", "no"], "qqp": ["no", "yes"], "rte": ["yes", "no"],
        "sst2": ["negative", "positive"], "stsb": "{:.1f}",
    }  # fmt: skip


def test_samples_are_glue_s_and_scored_as_published(served):
    suite = build("t5_glue8", TASKS, val=2, calibration=2)
    for task in suite.tasks:
        split, rows = task.split("test"), samples(task.name, "validation")
        answers = [
            facts()[task.name]["answers"][label] if task.name != "stsb" else f"{label:.1f}" for label in rows["label"]
        ]
        texts = [facts()[task.name]["prompt"].format(**{name: rows[name][i] for name in TEXTS[task.name]})
                 for i in range(PARTS["validation"])]  # fmt: skip
        assert sorted(zip(split.inputs.items, decoded(split.labels), strict=True)) == sorted(
            zip(texts, answers, strict=True)
        )
        given = ["3.8", "no", "Yes", *decoded(split.labels)[3:]]
        score = task.evaluate(lambda _, given=given: {"predicted": encoded(given)}, "test")
        truth = decoded(split.labels)
        if task.name == "stsb":
            numbers = [3.8, 0.0, 0.0, *map(float, truth[3:])]
            assert score.metric == "spearman"
            assert score.value == pytest.approx(stats.spearmanr(numbers, list(map(float, truth)))[0])
        else:
            assert score.value == sum(a == b for a, b in zip(given, truth, strict=True)) / 12
    assert len({task.content("test") for task in suite.tasks}) == 8


def test_experts_of_the_hub_write_as_transformers_does(served, backbone, tmp_path):
    suite, cache = build("t5_glue8", ("rte", "stsb"), val=2, calibration=2), Cache(tmp_path / "cache")
    experts = FULL.open(suite, backbone, cache)
    grid = Grid(suite, backbone, Engine("cpu", batch=5))
    assert {task: score.count for task, score in grid.score(Expert()(experts), "test").scores.items()} == {
        "rte": 12,
        "stsb": 12,
    }
    for index, task in enumerate(suite.tasks):
        prepare, read, _ = reading(backbone, task)
        inputs, whole = task.split("test").inputs, model(TASKS.index(task.name) + 1)
        with grid.module() as module, torch.no_grad():
            module.load_state_dict(dict(Expert()(experts).state(Expert()(experts).one_hot(index))), strict=False)
            found = decoded(read(module, prepare(inputs)))
            for text, prompt in zip(found, inputs, strict=True):
                ids = whole.generate(torch.tensor(backbone.ids([prompt])), max_length=10)
                assert text == backbone.text(ids[0].tolist())
        assert len(set(found)) > 1


def test_adapters_of_the_hub_are_products(served, backbone, tmp_path):
    suite, cache = build("t5_glue8", ("rte", "stsb"), val=2, calibration=2), Cache(tmp_path / "cache")
    experts = LORA.open(suite, backbone, cache)
    state = adapter(TASKS.index("stsb") + 1)[1]
    for name in ADAPTED:
        a, b = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(experts.tau(f"{name}.weight")[1], 2 * b @ a, atol=1e-5, rtol=1e-5)
    assert float(experts.tau("shared.weight").abs().max()) == 0
    for method in (TaskArithmetic(), Twin(keep=0.5)):
        assert Grid(suite, backbone).score(method(experts), "test").scores.keys() == {"rte", "stsb"}


@pytest.mark.parametrize(("name", "numbers"), [("flan_t5_base", 247_577_856), ("flan_t5_large", 783_150_080)])
def test_backbones_are_the_published_models(name, numbers):
    known = yaml.safe_load((Path(__file__).parents[2] / f"conf/backbone/{name}.yaml").read_text())
    built = HuggingFace(**{key: value for key, value in known.items() if key != "_target_"})
    with torch.device("meta"):
        assert sum(tensor.numel() for tensor in built.build().parameters()) == numbers
