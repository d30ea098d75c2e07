"""GLUE on miniature copies of the data set and of its published experts, served by a loopback hub."""

import json

import numpy
import pytest
import torch
from glue_copies import LABELS, PARTS, SIZES, TEXTS, data, parquet, repository, roberta, samples, tokenizer
from hub import Hub

from merging import Cache, UserError
from merging.backbones.hugging_face import HuggingFace
from merging.methods import Expert
from tasks.evaluate import Grid
from tasks.hub import plan
from tasks.repositories import Repositories
from tasks.suite import remarks
from tasks.text.glue import build, facts

transformers = pytest.importorskip("transformers")
TASKS = tuple(TEXTS)
BELOW = "{task}/roberta-base_lr1e-05"
SOURCE = Repositories("glue_roberta", "FacebookAI/roberta-base", "lu-vae/roberta-glue", BELOW)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The experts, a folder with the tokenizer, and one with the data set."""
    root = tmp_path_factory.mktemp("glue")
    for name, content in {**tokenizer(), **{f"data/{name}": content for name, content in data().items()}}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root, {task: roberta(seed, task) for seed, task in enumerate(TASKS, 1)}


@pytest.fixture
def served(made, tmp_path, monkeypatch):
    """A hub with the data set, the base and all experts."""
    with Hub(tmp_path / "served") as hub:
        hub.here(monkeypatch, tmp_path / "hf")
        hub.add("nyu-mll/glue", data(), "datasets")
        hub.add("FacebookAI/roberta-base", repository(roberta(0)))
        for task, expert in made[1].items():
            hub.add("lu-vae/roberta-glue", repository(expert, BELOW.replace("{task}", task)))
            hub.add("vanillaOVO/ckpts", repository(expert, task, pickled=True))
        yield hub


def backbone(root, length=12):
    config = {"model_type": "roberta", **SIZES}
    return HuggingFace("roberta_base", "RobertaForSequenceClassification", config, "first", str(root), length)


def copy(root, *tasks, **options):
    return build("glue8", tasks or TASKS, **{"folder": f"{root}/data", **options})


def test_what_is_known_of_the_tasks_is_what_their_files_have():
    assert list(facts()["tasks"]) == list(TASKS)
    for task, known in facts()["tasks"].items():
        assert known["texts"] == TEXTS[task] and known["classes"] == (LABELS[task] or [])
    metrics = {task: known["metrics"][0] for task, known in facts()["tasks"].items()}
    assert metrics == {"cola": "matthews", "mrpc": "accuracy_f1", "qqp": "accuracy_f1", "stsb": "pearson_spearman",
                       **dict.fromkeys(("sst2", "mnli", "qnli", "rte"), "accuracy")}  # fmt: skip
    tests = {task: known["sizes"]["test"] for task, known in facts()["tasks"].items()}
    assert sum(min(1000, size) for size in tests.values()) == 6557  # the authors' file has one more of five tasks
    assert {t: f["test"] for t, f in facts()["tasks"].items() if "test" in f} == {"mnli": "validation_matched"}


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_mergelm_s(made, task):
    (own,) = copy(made[0], task, val=3, calibration=5).tasks
    stored, order = samples(task, "train"), numpy.random.RandomState(0).permutation(PARTS["train"])
    rows = {"train": order[:36], "val": order[36:39], "calibration": order[:5], "test": numpy.arange(12)}
    for name, indices in rows.items():
        part = samples(task, "validation") if name == "test" else stored
        want = [tuple(part[column][i] for column in TEXTS[task]) for i in indices]
        split = own.split(name)
        have = [(item,) if isinstance(item, str) else item for item in split.inputs.items]
        labels = dict(zip(want, (part["label"][i] for i in indices), strict=True))
        assert sorted(have) == sorted(want) and split.labels.tolist() == [labels[item] for item in have]
        assert split.labels.dtype == (torch.int64 if LABELS[task] else torch.float32)
    (short,) = copy(made[0], task, first=4).tasks
    assert len(short.split("test")) == 4 and short.content("test") != own.content("test")
    assert short.content("train") != own.content("train") and short.is_local


def test_everything_comes_from_the_hub_and_scores_as_transformers_says(served, made, tmp_path):
    root, models = made
    suite = build("glue8", TASKS, val=2, calibration=2)
    planned = plan(
        [*SOURCE.downloads(suite, backbone(root)), *(f for t in suite.tasks for f in t.data.files(["test"]))]
    )
    assert [file.name for file in planned[:3]] == [
        "FacebookAI/roberta-base/model.safetensors", "lu-vae/roberta-glue/cola/roberta-base_lr1e-05/config.json",
        "lu-vae/roberta-glue/cola/roberta-base_lr1e-05/model.safetensors"]  # fmt: skip
    assert (
        planned[-3].name == "nyu-mll/glue/mnli/validation_matched-00000-of-00001.parquet"
        and not suite.tasks[0].is_local
    )
    assert not served.asked("GET", "resolve")
    cache = Cache(tmp_path / "cache")
    headed = SOURCE.headed(suite, backbone(root), cache)
    grid = Grid(headed, backbone(root))
    scored = grid.score(Expert()(SOURCE.open(headed, backbone(root), cache)), "test").scores
    encode = transformers.AutoTokenizer.from_pretrained(str(root))
    for task in headed.tasks:
        columns = [samples(task.name, "validation")[column] for column in TEXTS[task.name]]
        inputs = encode(*columns, padding=True, truncation=True, max_length=12, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            logits = models[task.name](**inputs).logits
        labels = torch.tensor(samples(task.name, "validation")["label"])
        if task.name == "stsb":
            assert scored["stsb"].parts["pearson"] == pytest.approx(
                float(torch.corrcoef(torch.stack([logits[:, 0], labels]))[0, 1]), abs=1e-5)  # fmt: skip
        else:
            accuracy = float((logits.argmax(1) == labels).double().mean())
            score = scored[task.name]
            assert score.parts.get("accuracy", score.value) == pytest.approx(accuracy)


def test_pickled_experts_are_the_same_experts(served, made, tmp_path):
    pickled = Repositories("glue_roberta_bin", "FacebookAI/roberta-base", "vanillaOVO/ckpts", "{task}")
    suite, cache = build("glue8", ("mnli", "stsb")), Cache(tmp_path / "cache")
    one, other = (source.open(suite, backbone(made[0]), cache) for source in (SOURCE, pickled))
    assert list(one.specs()) == list(other.specs()) and not any("classifier" in key for key in one.specs())
    for key in one.keys():  # noqa: SIM118, of experts
        assert torch.equal(one.tau(key), other.tau(key))


def test_a_held_out_task_answers_with_its_own_expert_s_head(served, made, tmp_path):
    suite, cache = build("glue8", ("cola", "rte", "mnli"), held_out=("mnli",)), Cache(tmp_path / "cache")
    headed = SOURCE.headed(suite, backbone(made[0]), cache)
    head = headed.held_out[0].head()
    assert torch.equal(head[2].weight, made[1]["mnli"].classifier.out_proj.weight)
    assert SOURCE.open(headed, backbone(made[0]), cache).tasks == ("cola", "rte")


def test_heads_with_their_classes_in_another_order(served, made, tmp_path):
    turned = roberta(1, "mnli", ["contradiction", "entailment", "neutral"])
    served.add("lu-vae/roberta-glue", repository(turned, BELOW.replace("{task}", "mnli")))
    with pytest.raises(
        UserError, match=r"mnli: output 0 is entailment, and in the head of its expert.* it is contradict"
    ):
        SOURCE.headed(build("glue8", ("mnli",)), backbone(made[0]), Cache(tmp_path / "cache"))


def rewritten(root, tmp_path, task, columns, labels=None):
    """A copy of one task with another test part."""
    folder = tmp_path / "data" / task
    folder.mkdir(parents=True)
    (folder / "train-00000-of-00001.parquet").write_bytes(parquet(samples(task, "train"), LABELS[task]))
    (folder / "validation-00000-of-00001.parquet").write_bytes(parquet(columns, labels or LABELS[task]))
    (own,) = copy(tmp_path, task).tasks
    return own


def test_copies_that_are_not_glue(made, tmp_path):
    columns = samples("rte", "validation")
    other = rewritten(made[0], tmp_path / "order", "rte", columns, ["not_entailment", "entailment"])
    with pytest.raises(UserError, match=r"labels of rte are not_entailment, entailment here, and entailment, not_ent"):
        other.split("test")
    hidden = rewritten(made[0], tmp_path / "hidden", "rte", samples("rte", "test"))
    with pytest.raises(
        UserError, match=r"rte \(test\) has the label -1, and its classes are 0 to 1. The labels of GLUE"
    ):
        hidden.split("test")
    renamed = rewritten(made[0], tmp_path / "columns", "rte", {"text": columns["sentence1"], "label": columns["label"]})
    with pytest.raises(UserError, match="has no column 'sentence1', only text, label"):
        renamed.split("test")
    with pytest.raises(UserError, match=r"There is no .*cola/train-00000-of-00001\.parquet"):
        copy(tmp_path / "nowhere", "cola").tasks[0].split("train")


@pytest.mark.parametrize(("task", "labels", "refused"), [
    ("cola", [1] * 4, "matthews is not defined for the task cola: all labels are of one class"),
    ("stsb", [2.5] * 4, "pearson_spearman is not defined for the task stsb: all labels are the same number"),
    ("sst2", [1] * 4, None),
])  # fmt: skip
def test_labels_that_are_all_alike(made, tmp_path, task, labels, refused):
    texts = {column: ["the cat", "a dog", "red mat", "big"] for column in TEXTS[task]}
    own = rewritten(made[0], tmp_path, task, texts | {"label": labels, "idx": [0, 1, 2, 3]})
    predict = lambda split: {"predicted": torch.zeros(4) if task == "stsb" else torch.tensor([0, 1, 1, 1])}  # noqa: E731
    if refused:
        with pytest.raises(UserError, match=refused):
            own.evaluate(predict, "test")
    else:
        assert own.evaluate(predict, "test").value == 0.75


def test_constant_predictions_score_nothing_and_say_so(made):
    (stsb,) = copy(made[0], "stsb").tasks
    score = stsb.evaluate(lambda split: {"predicted": torch.full((12,), 3.0)}, "test")
    assert score.value == 0 and score.notes[0] == "pearson_spearman is 0 because every prediction is the same number"


def test_texts_that_are_empty_or_longer_than_is_read_are_counted(made, tmp_path):
    columns = {"sentence": ["", " ", "the cat", " ".join(["dog"] * 30)], "label": [0, 1, 0, 1], "idx": [0, 1, 2, 3]}
    own = rewritten(made[0], tmp_path, "cola", columns)
    suite = copy(tmp_path, "cola")
    tiny = backbone(made[0])
    notes = remarks(suite, {"cola": suite.tasks[0].split("test")}, (), tiny)
    assert notes == ["cola: 2 of 4 samples of test have an empty text.",
                     "cola: 1 of 4 texts of test are cut at 12 tokens."]  # fmt: skip
    inputs = tiny.prepare(own.split("test").inputs)
    assert inputs["input_ids"].shape == (4, 12) and inputs["attention_mask"][0].sum() == 2
    with pytest.raises(UserError, match=r"backbone\.length=40 is longer than the context of roberta_base, 32 tokens"):
        backbone(made[0], 40).prepare(["the cat"])


def test_a_text_without_a_token(made, tmp_path):
    bare = json.loads(tokenizer()["tokenizer.json"])
    bare["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare))
    (tmp_path / "tokenizer_config.json").write_bytes(
        tokenizer()["tokenizer_config.json"].replace(b'"pad_token": "<pad>", ', b"")
    )
    tiny = backbone(tmp_path)
    assert tiny.prepare(["cat", "the cat"])["attention_mask"].tolist() == [[1, 0], [1, 1]]
    with pytest.raises(UserError, match="given a text without a token, an empty one"):
        tiny.prepare(["cat", ""])


def test_options_that_are_none():
    with pytest.raises(UserError, match=r"suite.first=0 leaves a split of glue8 empty"):
        build("glue8", TASKS, first=0)
    with pytest.raises(UserError, match="not defined for stsb"):
        build("glue7", TASKS, metrics="accuracy")
    with pytest.raises(UserError, match="There is no task 'wnli' in the suite glue8"):
        build("glue8", ("wnli",))
    assert {task.metrics for task in build("glue7", TASKS[:3], metrics="accuracy").tasks} == {("accuracy",)}
