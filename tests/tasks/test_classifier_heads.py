"""Heads of an expert's own: classifiers out of checkpoints, class orders, linear probes."""

import json
from types import SimpleNamespace

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional

from merging import Cache
from merging.checkpoints import StateDict
from merging.errors import UserError
from tasks.heads.head import check_class_orders, classes_in
from tasks.heads.probe import Probe, fit_linear
from tasks.task import Arrays, LabelledTask, array_task

RANDOM = torch.Generator().manual_seed(0)


def test_a_head_with_another_number_of_classes_than_its_task():
    task = array_task("pets", {}, nn.Linear(4, 3), classes=("cat", "dog"))
    with pytest.raises(UserError, match="head of pets has 3 outputs, and the task has 2 classes"):
        task.head()


def test_heads_in_another_order_than_the_labels_or_than_one_another(tmp_path):
    check_class_orders({"a": ("Cat", "red_fox"), "b": ()}, {"a": ("cat", "red fox")})
    check_class_orders({"a": ("cat", "dog"), "b": ("dog", "cat")}, {"a": ("cat", "dog"), "b": ("dog", "cat")})
    with pytest.raises(
        UserError, match="a: output 0 is cat, and in the head of its expert, unlike in the labels of a it is dog"
    ):
        check_class_orders({"a": ("dog", "cat")}, {"a": ("cat", "dog")})
    with pytest.raises(UserError, match="b: output 0 is cat, and in the head of a it is dog"):
        check_class_orders({"a": ("dog", "cat"), "b": ("cat", "dog")}, {"a": (), "b": ()})
    assert classes_in(tmp_path) == ()
    for names, want in ((["b", "a"], ("b", "a")), (["LABEL_0", "LABEL_1"], ())):
        labels = {str(index): name for index, name in enumerate(names)}
        (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
        assert classes_in(tmp_path) == want


@pytest.mark.parametrize("count", [2, 3])
def test_a_probe_is_logistic_regression_on_standardised_features(count):
    x = 3 + torch.randn(60, 4, generator=RANDOM) * torch.tensor([1.0, 10, 0.1, 1])
    y = torch.arange(60) % count
    x[torch.arange(60), y] += 2
    weight, bias = fit_linear(x, y)
    again = LogisticRegression(max_iter=1000).fit(((x - x.mean(0)) / x.std(0, unbiased=False)).numpy(), y.numpy())
    expected = torch.from_numpy(again.predict_proba(((x - x.mean(0)) / x.std(0, unbiased=False)).numpy())).float()
    torch.testing.assert_close(functional.softmax(x @ weight.T + bias, -1), expected, rtol=0, atol=2e-3)
    assert torch.equal(fit_linear(x, y)[0], weight)


def test_a_probe_of_numbers_is_ridge_regression():
    x = torch.randn(50, 3, generator=RANDOM)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 4
    weight, bias = fit_linear(x, y)
    z = ((x - x.mean(0)) / x.std(0, unbiased=False)).double()
    closed = torch.linalg.solve(z.T @ z + torch.eye(3), z.T @ (y - y.mean()).double())
    torch.testing.assert_close((x @ weight.T + bias)[:, 0], (z @ closed + y.mean()).float(), rtol=1e-4, atol=1e-4)


def test_a_probe_reads_the_features_of_its_expert_once(tmp_path):
    built = []
    build = lambda: built.append(1) or nn.Linear(3, 3)  # noqa: E731
    calls = {"prepare": lambda x: x, "features": lambda module, x: module(x), "identity": dict}
    backbone = SimpleNamespace(build=build, **calls)
    inputs, labels = torch.randn(30, 3, generator=RANDOM), torch.arange(30) % 2
    expert = StateDict({"weight": torch.eye(3) * 2, "bias": torch.zeros(3)})
    data = Arrays({"train": (inputs, labels)}, ("a", "b"))
    task = LabelledTask("t", data, Probe(expert, backbone, data, Cache(tmp_path)))
    torch.testing.assert_close(task.head().weight, fit_linear(2 * inputs, labels)[0])
    assert task.content("head") == LabelledTask("t", data, task.heads).content("head")
    LabelledTask("t", data, task.heads).head()
    assert len(built) == 1
    with pytest.raises(UserError, match="t has no training sample of c"):
        LabelledTask("t", Arrays(data.splits, "abc"), task.heads).head()
