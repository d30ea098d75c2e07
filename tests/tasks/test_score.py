"""Scores: their standard errors, what is refused, and the normalised score."""

import json
import math

import pytest
import torch

from merging.errors import UserError
from tasks.score import Score, accuracy, bootstrap, normalise


def of(value: float, metric: str = "accuracy", higher: bool = True) -> Score:
    return Score(metric, value, 10, 0.1, higher)


def test_json_both_ways():
    score = Score("f1", 0.5, 8, 0.02, parts={"accuracy": 0.75}, notes=("one class is never predicted",))
    assert Score.from_json(json.loads(json.dumps(score.to_json()))) == score


def test_accuracy_has_the_standard_error_of_a_proportion():
    score = accuracy(30, 40)
    assert (score.value, score.count) == (0.75, 40)
    assert score.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 40))


def test_bootstrap_agrees_with_the_closed_form_and_repeats():
    right = (torch.arange(400) < 300).double()
    error = bootstrap(lambda draws: right[draws].mean(1).tolist(), 400)
    assert error == pytest.approx(accuracy(300, 400).standard_error, rel=0.1)
    assert error == bootstrap(lambda draws: right[draws].mean(1).tolist(), 400)


@pytest.mark.parametrize("odd", [{"value": math.nan}, {"standard_error": math.inf}, {"parts": {"f1": math.nan}}])
def test_a_score_that_is_no_number_is_refused(odd):
    with pytest.raises(UserError, match="no finite value"):
        Score(**{"metric": "matthews", "value": 0.1, "count": 5, "standard_error": 0.0, **odd})


def test_normalised_score_names_and_excludes_what_is_undefined():
    scores = {"a": of(0.4), "b": of(0.9), "c": of(0.1, "matthews"), "d": of(2.0, "perplexity", False), "e": of(0.5)}
    experts = {"a": of(0.8), "b": of(0.9), "c": of(-0.2, "matthews"), "d": of(1.0, "perplexity", False)}
    value, undefined = normalise(scores, experts)
    assert value == pytest.approx((0.5 + 1.0) / 2)
    assert list(undefined) == ["c", "d", "e"]
    assert "not above 0" in undefined["c"] and "lower perplexity" in undefined["d"]
    assert normalise({"c": scores["c"]}, experts).value is None
