"""Tasks of token ids in memory: a RoBERTa with heads of different sizes and metrics, merged and scored."""

import pytest
import torch
from scipy import stats

from merging import load, open_merged
from merging.backbones.hugging_face import HuggingFace, head_of
from merging.context import Context
from merging.experts import Experts
from merging.fit.gates import Learned, TaskId
from merging.methods import Average, Base, Expert, Ties, Twin
from merging.routing.gates import GateShape
from merging.routing.install import install
from tasks.data import SuiteData
from tasks.engine import Engine
from tasks.evaluate import Grid
from tasks.scales import Search
from tasks.suite import Suite
from tasks.task import array_task

transformers = pytest.importorskip("transformers")
CONFIG = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
          "intermediate_size": 32, "max_position_embeddings": 20}  # fmt: skip
BACKBONE = HuggingFace("tiny", "RobertaForSequenceClassification", {"model_type": "roberta", **CONFIG}, "first")
OUTPUTS = {"cola": 2, "mnli": 3, "stsb": 1}
METRICS = {"cola": ("matthews", "accuracy"), "mnli": ("accuracy",), "stsb": ("pearson", "spearman")}


def model(task, seed):
    torch.manual_seed(seed)
    config = transformers.RobertaConfig(**CONFIG, num_labels=OUTPUTS[task])
    return transformers.RobertaForSequenceClassification(config).eval()


def samples(task):
    """Ids with padding on the right, their mask, and labels."""
    torch.manual_seed(len(task))
    ids, lengths = torch.randint(3, 60, (24, 9)), torch.randint(3, 10, (24,))
    mask = (torch.arange(9) < lengths[:, None]).long()
    labels = torch.randn(24) if task == "stsb" else torch.arange(24) % OUTPUTS[task]
    return {"input_ids": ids.where(mask.bool(), torch.tensor(1)), "attention_mask": mask}, labels


@pytest.fixture(scope="module")
def made():
    """Models of transformers, the suite with their heads, and the encoders as experts of a random base."""
    models = {task: model(task, seed) for seed, task in enumerate(OUTPUTS, 1)}
    heads = {task: head_of(made.classifier.state_dict()) for task, made in models.items()}
    tasks = [
        array_task(task, {"val": samples(task), "test": samples(task)}, heads[task], METRICS[task]) for task in OUTPUTS
    ]
    encoders = [{key: value for key, value in made.state_dict().items() if not key.startswith("classifier")}
                for made in models.values()]  # fmt: skip
    base = {key: value for key, value in model("cola", 9).state_dict().items() if key in encoders[0]}
    return models, Suite("text", tuple(tasks)), Experts.open(base, encoders, tuple(OUTPUTS))


@pytest.mark.parametrize("batch", [5, 24])
def test_experts_score_as_transformers_says(made, batch):
    models, suite, experts = made
    scored = Grid(suite, BACKBONE, Engine("cpu", batch=batch)).score(Expert()(experts), "test").scores
    assert [scored[task].metric for task in OUTPUTS] == ["matthews", "accuracy", "pearson"]
    with torch.no_grad():
        logits = {task: models[task](**samples(task)[0]).logits for task in OUTPUTS}
    right = lambda task: float((logits[task].argmax(1) == samples(task)[1]).double().mean())  # noqa: E731
    assert scored["cola"].parts["accuracy"] == pytest.approx(right("cola"))
    assert scored["mnli"].value == pytest.approx(right("mnli"))
    numbers = logits["stsb"][:, 0].double().numpy(), samples("stsb")[1].double().numpy()
    assert scored["stsb"].value == pytest.approx(stats.pearsonr(*numbers)[0], abs=1e-5)
    assert scored["stsb"].parts["spearman"] == pytest.approx(stats.spearmanr(*numbers)[0], abs=1e-5)


def test_merges_are_scored_and_searched(made):
    _, suite, experts = made
    grid = Grid(suite, BACKBONE)
    for method in (Base(), Average(), Ties()):
        scored = grid.score(method(experts), "test")
        assert set(scored.scores) == set(OUTPUTS) and scored.routing is None
    chosen = Search([0.2, 0.9], "mean").choose(Ties()(experts), grid, lambda split: {})
    alone = [grid.score(Ties()(experts).scaled(scale), "val").scores for scale in (0.2, 0.9)]
    assert chosen.validation == alone[[0.2, 0.9].index(chosen.merged.scale)]


@pytest.mark.parametrize("granularity", ["sample", "mixed"])
def test_a_router_serves_tasks_of_several_metrics(made, granularity):
    _, suite, experts = made
    shape = GateShape(sees="early", granularity=granularity)
    router = Learned(gate=shape, train=TaskId(steps=3), split="val")
    merged, _ = router.fit(Twin(keep=0.5)(experts), experts, Context(SuiteData(suite, BACKBONE)))
    scored = Grid(suite, BACKBONE).score(merged, "test")
    assert {task: score.metric for task, score in scored.scores.items()} == {task: METRICS[task][0] for task in OUTPUTS}
    assert [sum(row) for row in scored.routing.matrix] == pytest.approx([1] * 3, abs=1e-5)


@pytest.mark.parametrize("method", [Ties(), Twin(keep=0.5)], ids=["static", "routed"])
def test_a_saved_model_scores_the_same(made, method, tmp_path):
    _, suite, experts = made
    merged = method(experts)
    if merged.deltas:
        router = Learned(gate=GateShape(sees="early"), train=TaskId(steps=2), split="val")
        merged, _ = router.fit(merged, experts, Context(SuiteData(suite, BACKBONE)))
    path, grid = merged.save(tmp_path / "merged.safetensors", backbone=BACKBONE.facts()), Grid(suite, BACKBONE)
    assert grid.score(open_merged(path), "test").scores == grid.score(merged, "test").scores
    inputs = BACKBONE.prepare(samples("mnli")[0])
    with torch.no_grad():
        features = [BACKBONE.features(model, inputs) for model in (load(path), install(BACKBONE.build(), merged))]
    assert torch.equal(*features)
