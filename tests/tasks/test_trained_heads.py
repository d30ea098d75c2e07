"""Experts whose heads are trained with them: a tiny BERT on token ids, classes and numbers."""

from dataclasses import dataclass, replace

import pytest
import torch

from merging.backbones.hugging_face import HuggingFace
from merging.cache import Cache
from merging.checkpoints import StateDict
from merging.errors import UserError
from merging.methods import Expert, LinearProbe
from tasks import finetune
from tasks.engine import Engine
from tasks.evaluate import Grid
from tasks.finetune import Job, Recipe
from tasks.heads.probe import probed
from tasks.suite import Suite
from tasks.task import array_task
from tasks.training import Training, order

pytest.importorskip("transformers")
CONFIG = {"model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
          "intermediate_size": 32, "max_position_embeddings": 16}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BACKBONE = HuggingFace("tiny", "BertModel", CONFIG | NO_DROPOUT, "mean")
RECIPE = Recipe(steps=120, batch=16, lr=3e-3, warmup=10, head_lr=1e-2, frozen=["pooler.dense.weight"])

torch.manual_seed(7)
STATE = BACKBONE.build().state_dict()


def samples(count, seed, numbers):
    """Ids whose first token says the class, or the number."""
    random = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 3, (count,), generator=random)
    ids = torch.cat([first[:, None] + 3, torch.randint(10, 40, (count, 7), generator=random)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, (first - 1).float() if numbers else first


def task(name):
    numbers = name == "number"
    splits = {split: samples(size, size, numbers) for split, size in {"train": 240, "val": 40, "test": 40}.items()}
    return array_task(name, splits, None, ("pearson" if numbers else "accuracy",), () if numbers else ("a", "b", "c"))


@dataclass(frozen=True)
class Tiny(finetune.FineTuned):
    family: str = "tiny"

    def base(self, backbone, cache):
        return StateDict(STATE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The source, the suite without heads and with those of the experts, the experts, and their cache."""
    source, suite = Tiny(recipe=RECIPE, workers=1), Suite("ids", (task("class"), task("number")))
    cache = Cache(tmp_path_factory.mktemp("cache"))
    headed = source.headed(suite, BACKBONE, cache)
    return source, suite, headed, source.open(suite, BACKBONE, cache), cache


def test_heads_learn_with_the_experts(made):
    _, suite, headed, experts, _ = made
    scores = Grid(headed, BACKBONE).score(Expert()(experts), "val").scores
    assert scores["class"].value > 0.9 and scores["number"].value > 0.9
    assert [task.head().weight.shape for task in headed.tasks] == [(3, 16), (1, 16)]
    assert all(task.head() is None for task in suite.tasks)


def test_heads_are_no_part_of_what_is_merged(made):
    _, _, _, experts, _ = made
    keys = experts.keys()
    assert "encoder.layer.0.output.dense.weight" in keys and not any("classifier" in key for key in keys)
    assert torch.equal(experts.checkpoints[0].tensor("pooler.dense.weight"), STATE["pooler.dense.weight"])  # frozen


def test_probes_of_the_base_are_heads_that_saw_no_expert(made):
    source, suite, headed, experts, cache = made
    of_base = replace(source, heads_from="base").headed(suite, BACKBONE, cache)
    base = Grid(of_base, BACKBONE).score(LinearProbe()(experts), "val").scores
    expert = Grid(headed, BACKBONE).score(Expert()(experts), "val").scores
    assert 0.33 < base["class"].value <= expert["class"].value
    assert not torch.equal(of_base.tasks[0].head().weight, headed.tasks[0].head().weight)


def test_the_probes_of_a_model_are_those_of_the_base_where_it_is_the_base(made):
    source, suite, headed, _, cache = made
    of_base = replace(source, heads_from="base").headed(suite, BACKBONE, cache)
    of_model = probed(headed, StateDict(STATE), BACKBONE, Engine("cpu"))
    for one, other in zip(of_model.tasks, of_base.tasks, strict=True):
        assert torch.equal(one.head().weight, other.head().weight) and torch.equal(one.head().bias, other.head().bias)
    with pytest.raises(UserError, match="class has no head that a linear probe could stand in for"):
        probed(suite, StateDict(STATE), BACKBONE, Engine("cpu"))


def test_a_model_of_all_tasks_is_refused(made):
    source, suite, _, _, cache = made
    with pytest.raises(UserError, match="heads of their own"):
        source.open_multitask(suite, BACKBONE, cache)


def test_going_on_from_a_snapshot_gives_the_same_head():
    job = Job(STATE, BACKBONE, task("class"), RECIPE, 0, task("class").split("train"), "")
    whole = Training(job)
    whole.run()
    stopped = Training(job)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(lambda: stop(stopped))
    resumed = Training(job)
    resumed.resume(10, stopped.snapshot())
    resumed.run()
    for key, value in whole.weights().items():
        assert torch.equal(value, resumed.weights()[key]), key
    assert {"classifier.weight", "classifier.bias"} <= whole.weights().keys()


def stop(training):
    if training.step == 10:
        raise KeyboardInterrupt


def test_bf16_trains_the_weights_in_fp32():
    job = Job(STATE, BACKBONE, task("number"), RECIPE, 0, task("number").split("train"), "")
    training = Training(job, Engine("cpu", "bf16"))
    training.run()
    assert {value.dtype for value in training.weights().values()} == {torch.float32}


def test_batches_by_length_hold_neighbours_and_every_sample_once():
    recipe = Recipe(steps=10, batch=10, group_by_length=True)
    batches = list(order([100], recipe, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat(batches).tolist()) == list(range(100))
    spreads = [int(batch.max() - batch.min()) for batch in batches]
    assert max(spreads) == 9  # all 100 are put in order together
    assert [int(batch.min()) for batch in batches] != sorted(int(batch.min()) for batch in batches)
