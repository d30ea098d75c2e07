"""Words alone as a baseline: where the class is a word they find it, in either text of a pair."""

import torch

from tasks.split import Texts
from tasks.task import array_task
from tasks.text.baselines import score

WORDS = ("sun", "rain", "wind", "snow", "fog", "hail", "frost", "storm")


def split(offset, pairs):
    texts = [f"today {WORDS[(i + offset) % 8]} comes" for i in range(32)]
    labels = torch.tensor([(i + offset) % 2 for i in range(32)])
    items = tuple(
        (text, f"then {'yes' if label else 'no'}") for text, label in zip(texts, labels.tolist(), strict=True)
    )
    return Texts(items if pairs else tuple(texts)), labels


def test_words_that_decide_a_class_are_found():
    for pairs in (False, True):
        splits = {name: split(offset, pairs) for offset, name in enumerate(("train", "val", "test"))}
        result = score(array_task("weather", splits, classes=("no", "yes")), "test")
        assert result.value == 1.0 and result.count == 32


def test_numbers_are_fitted_by_ridge():
    inputs, labels = split(0, False)
    numbers = labels.float() * 2 - 1
    splits = dict.fromkeys(("train", "val", "test"), (inputs, numbers))
    assert score(array_task("degrees", splits, metrics=("pearson",)), "test").value > 0.99
