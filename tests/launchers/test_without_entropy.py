"""A row that learned by entropy names the tasks whose heads have none."""

import pytest
import torch
from torch import nn

from launchers.cells import without_entropy
from merging.fit import Descent
from merging.fit.gates import Gradient, Learned, Oracle
from merging.fit.objectives import Entropy, FeatureDistillation, PseudoLabels
from merging.methods import AdaMerging, Atlas, Average, Concrete, FwHard
from tasks.suite import Suite
from tasks.task import array_task

SPLITS = {"train": (torch.zeros(2, 3), torch.zeros(2))}
SUITE = Suite(
    "two",
    (
        array_task("kinds", SPLITS, nn.Linear(3, 2), classes=("no", "yes")),
        array_task("numbers", SPLITS, nn.Linear(3, 1), metrics=("pearson",)),
        array_task("texts", SPLITS, metrics=("exact_match",)),
    ),
)


@pytest.mark.parametrize(
    ("method", "router", "named"),
    [
        (AdaMerging(), Oracle(), ["numbers"]),
        (Atlas(train=Descent([PseudoLabels()])), Oracle(), ["numbers"]),
        (Concrete(), Oracle(), ["numbers"]),
        (FwHard(objective=Entropy()), Oracle(), ["numbers"]),
        (FwHard(AdaMerging()), Oracle(), ["numbers"]),
        (FwHard(), Oracle(), []),
        (Average(), Learned(train=Gradient([Entropy()])), ["numbers"]),
        (Average(), Learned(train=Gradient([FeatureDistillation()])), []),
        (Average(), Learned(), []),
    ],
)
def test_tasks_with_one_output_are_named_where_entropy_is_learned_from(method, router, named):
    assert without_entropy(SUITE, method, router) == named
