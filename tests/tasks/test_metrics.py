"""Every metric against scikit-learn or scipy, and where it has no meaning."""

import math

import pytest
import torch
from scipy import stats
from sklearn import metrics as reference

from merging.errors import UserError
from tasks.metrics import measure, metric, metrics
from tasks.metrics.metric import Rows

RANDOM = torch.Generator().manual_seed(0)
CLASSES = [torch.randint(3, (2, 50), generator=RANDOM), torch.tensor([[0, 2, 2, 0], [1, 2, 0, 0]])]
NUMBERS = [torch.randn(2, 40, generator=RANDOM), torch.tensor([[1.0, 2, 2, 3, 2], [5.0, 1, 5, 9, 9]])]
OF_CLASSES = {
    "accuracy": lambda predicted, true: reference.accuracy_score(true, predicted),
    "exact_match": lambda predicted, true: reference.accuracy_score(true, predicted),
    "f1_macro": lambda predicted, true: reference.f1_score(true, predicted, average="macro", zero_division=0),
    "matthews": lambda predicted, true: reference.matthews_corrcoef(true, predicted),
}
OF_NUMBERS = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}


def test_all_metrics_are_found():
    assert set(metrics()) == {*OF_CLASSES, *OF_NUMBERS, "f1", "accuracy_f1", "pearson_spearman", "rouge2"}
    with pytest.raises(UserError, match=r"no metric 'bleu'. Choose one of accuracy, "):
        metric("bleu")


@pytest.mark.parametrize("name", OF_CLASSES)
@pytest.mark.parametrize("pair", CLASSES)
def test_metrics_of_classes(name, pair):
    assert metric(name).value(*pair) == pytest.approx(OF_CLASSES[name](*pair), abs=1e-12)


@pytest.mark.parametrize("name", OF_NUMBERS)
@pytest.mark.parametrize("pair", NUMBERS)
def test_metrics_of_numbers(name, pair):
    assert metric(name).value(*pair) == pytest.approx(OF_NUMBERS[name](*pair.double().numpy())[0], abs=1e-9)


def test_binary_f1_is_of_class_one():
    predicted, true = torch.randint(2, (2, 30), generator=RANDOM)
    assert metric("f1").value(predicted, true) == pytest.approx(reference.f1_score(true, predicted))
    assert metric("f1").value(torch.zeros(3), torch.zeros(3)) == 0.0


def test_exact_match_compares_whole_sequences_but_for_ignored_positions():
    true = torch.tensor([[1, 2, -100], [1, 2, 3], [4, 4, 4]])
    assert metric("exact_match").value(torch.tensor([[1, 2, 9], [1, 2, 9], [4, 4, 4]]), true) == pytest.approx(2 / 3)


def test_a_constant_prediction_is_0_and_said():
    score = measure(["matthews", "accuracy"], "cola", torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 0, 1]))
    assert (score.value, score.parts) == (0.0, {"accuracy": 0.5}) and "predicted to be of one class" in score.notes[0]
    score = measure(["pearson"], "stsb", torch.ones(4), torch.randn(4))
    assert score.value == 0.0 and "the same number" in score.notes[0]


def test_standard_errors_are_those_of_samples():
    predicted, true = torch.randint(2, (2, 400), generator=RANDOM)
    score = measure(["accuracy"], "any", predicted, true)
    assert score.standard_error == pytest.approx(math.sqrt(score.value * (1 - score.value) / 400))
    x = torch.randn(400, generator=RANDOM)
    score = measure(["pearson"], "any", x + torch.randn(400, generator=RANDOM), x)
    assert score.standard_error == pytest.approx((1 - score.value**2) / math.sqrt(400), rel=0.15)  # Fisher


@pytest.mark.parametrize("name", [name for name, kind in metrics().items() if issubclass(kind, Rows)])
def test_rows_are_measured_one_by_one(name):
    random = torch.Generator().manual_seed(1)
    draw = torch.randint(2, (2, 6, 20), generator=random)
    predicted, labels = draw.float().cumsum(2) if metric(name).compares == "numbers" else draw
    predicted[0] = predicted[0, 0]  # a constant one
    values = metric(name).values(predicted, labels)
    assert values.tolist() == [metric(name).value(*row) for row in zip(predicted, labels, strict=True)]


def test_predictions_that_are_no_numbers_are_the_worst():
    true = torch.tensor([0, 1, 1])
    assert metric("f1_macro").value(torch.full((3,), -1), true) == 0.0
    assert metric("spearman").value(torch.full((3,), math.nan), torch.randn(3)) == -1.0


@pytest.mark.parametrize(
    ("name", "labels", "why"),
    [
        ("f1", torch.tensor([0, 1, 2]), "there are 3 classes"),
        ("matthews", torch.tensor([1, 1]), "all labels are of one class"),
        ("pearson", torch.tensor([2.0, 2.0]), "all labels are the same number"),
        ("pearson", torch.tensor([0, 1]), "compares numbers, and the labels are classes"),
        ("accuracy", torch.tensor([0.5, 1.0]), "compares classes, and the labels are numbers"),
        ("accuracy", torch.zeros(0, dtype=torch.int64), "no samples"),
    ],
)
def test_a_metric_that_is_not_defined_for_a_task(name, labels, why):
    with pytest.raises(UserError, match=f"{name} is not defined for the task any: .*{why}"):
        measure([name], "any", labels, labels)


def test_means_of_two_metrics_as_in_glue():
    generator = torch.Generator().manual_seed(3)
    labels, predicted = (torch.randint(0, 2, (40,), generator=generator) for _ in range(2))
    both = [metric(name).value(predicted, labels) for name in ("accuracy", "f1", "accuracy_f1")]
    assert both[2] == pytest.approx((both[0] + both[1]) / 2)
    x, y = torch.randn(2, 40, generator=generator)
    both = [metric(name).value(x, y) for name in ("pearson", "spearman", "pearson_spearman")]
    assert both[2] == pytest.approx((both[0] + both[1]) / 2)
