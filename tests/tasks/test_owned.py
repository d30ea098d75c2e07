"""Two protocols: a task's head is its own, or its head and all its biases."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from merging import Experts, UserError
from merging.backbones.hugging_face import HuggingFace
from merging.context import Context
from merging.fit.gates import Learned, TaskId
from merging.methods import Average, Base, Expert, TaskArithmetic, Twin
from merging.routing.gates import GateShape
from tasks.data import SuiteData
from tasks.evaluate import Grid
from tasks.suite import Suite
from tasks.task import array_task

pytest.importorskip("transformers")
BODY = {"model_type": "roberta", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 12, "vocab_size": 30, "pad_token_id": 0, "max_position_embeddings": 16}  # fmt: skip
BACKBONE = HuggingFace("tiny", "RobertaForSequenceClassification", BODY, "first", length=6)
NAMES = ("one", "two", "three")
BIAS = "roberta.encoder.layer.1.output.LayerNorm.bias"


def state(seed, base=None):
    torch.manual_seed(seed)
    made = BACKBONE.build().state_dict()
    return made if base is None else {key: base[key] + 0.1 * torch.randn(value.shape) for key, value in made.items()}


BASE = state(0)
STATES = [state(seed, BASE) for seed in (1, 2, 3)]
OPENED = Experts.open(BASE, STATES, NAMES, table="bert")
OWNED = replace(OPENED, owned="heads+biases")


def suite():
    """Numbers to predict: a score then follows every change of a weight."""
    tasks = []
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        inputs = {"input_ids": torch.randint(1, 30, (9, 6)), "attention_mask": torch.ones(9, 6, dtype=torch.int64)}
        splits = dict.fromkeys(("val", "calibration", "test"), (inputs, torch.randn(9)))
        tasks.append(array_task(name, splits, nn.Linear(8, 1), ("pearson",)))
    return Suite("some", tuple(tasks))


GRID = Grid(suite(), BACKBONE)


def values(merged):
    return GRID.score(merged, "test").values


def by_hand(states):
    """Scores of a state dict per task, without the library's merging."""
    scores = {}
    for task, weights in zip(GRID.suite.tasks, states, strict=True):
        module = BACKBONE.build()
        module.load_state_dict(weights)
        split = task.split("test")
        with torch.no_grad():
            predicted = task.head()(BACKBONE.features(module, dict(split.inputs))).reshape(-1)
        scores[task.name] = float(torch.corrcoef(torch.stack([predicted, split.labels]))[0, 1])
    return scores


def with_biases(weights):
    """What WUDI's and Twin-Merging's evaluators run: every name that is not merged comes from the true expert."""
    return [{key: own[key] if "bias" in key else value for key, value in weights.items()} for own in STATES]


def test_no_method_sees_an_owned_parameter_and_the_merge_still_has_all():
    assert not any("bias" in key for key in OWNED.specs()) and BIAS in OPENED.specs()
    merged = TaskArithmetic(0.4)(OWNED)
    assert list(merged.specs) == list(OPENED.specs()) and BIAS not in merged.shared
    assert merged.params == sum(t.numel() for key, t in BASE.items() if "bias" in key) * 3
    torch.testing.assert_close(merged.weight(BIAS), BASE[BIAS], rtol=0, atol=0)
    torch.testing.assert_close(merged.of("two").weight(BIAS), STATES[1][BIAS])


@pytest.mark.parametrize("scale", [0.0, 0.4])
def test_a_static_merge_scores_as_their_evaluators_have_it(scale):
    mixed = {key: value + scale * sum(own[key] - value for own in STATES) for key, value in BASE.items()}
    assert values(TaskArithmetic(scale)(OWNED)) == pytest.approx(by_hand(with_biases(mixed)), abs=1e-5)
    assert values(TaskArithmetic(scale)(OPENED)) == pytest.approx(by_hand([mixed] * 3), abs=1e-5)


def test_of_experts_both_protocols_are_the_same_and_of_the_base_they_are_not():
    assert values(Expert()(OWNED)) == pytest.approx(values(Expert()(OPENED)), abs=1e-6)
    assert values(Expert()(OPENED)) == pytest.approx(by_hand(STATES), abs=1e-5)
    assert values(Base()(OWNED)) != pytest.approx(values(Base()(OPENED)), abs=1e-3)


def test_a_search_scores_what_a_fixed_coefficient_scores():
    (low, high) = GRID.at_scales(TaskArithmetic(0.3)(OWNED), [0.1, 0.4], "test")
    for scores, scale in ((low, 0.1), (high, 0.4)):
        want = values(TaskArithmetic(scale)(OWNED))
        assert {task: score.value for task, score in scores.items()} == pytest.approx(want, abs=1e-6)


def routed(experts, sees: Any = "pass"):
    """A twin around the average, its gate trained a little."""
    merged = Twin(shared=Average(), keep=1.0, start=None if sees == "pass" else 0)(experts)
    router = Learned("some", GateShape(sees, 1, "mean", standardise=False), TaskId(3, 8))
    return router.fit(merged, experts, Context(SuiteData(GRID.suite, BACKBONE)))[0]


def test_the_gate_does_not_see_the_true_task_s_biases():
    merged = routed(OWNED)
    assert merged.owned.keys() == set(NAMES)
    scored = GRID.score(merged, "test")
    blind = GRID.score(replace(merged, owned={}), "test")
    assert scored.routing is not None and scored.routing == blind.routing
    assert scored.values != pytest.approx(blind.values, abs=1e-4)


def test_gates_inside_the_network_are_refused():
    with pytest.raises(UserError, match=r"gates that decide inside the network \(block\) would see them"):
        values(routed(OWNED, "block"))


def test_what_there_is_no_model_or_no_expert_for(tmp_path):
    merged = Average()(OWNED)
    with pytest.raises(UserError, match=r"no model that could be saved\. Save with owned=heads"):
        merged.save(tmp_path / "merged.safetensors")
    with pytest.raises(UserError, match="four has no expert to take them from"):
        merged.of("four")
    with pytest.raises(UserError, match=r"owned=all is unknown. Choose heads or heads\+biases"):
        replace(OPENED, owned="all")
    assert Average()(OPENED).of("four").owned == {}
