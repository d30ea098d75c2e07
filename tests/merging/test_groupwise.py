"""Merging in groups: who shares a merge, and what the groups answer."""

import pytest
import torch
from ffns import close, small_towers
from samples import BACKBONE, drawn, merged_of

from merging import UserError
from merging.methods import Twin
from merging.routing.groups import group, k_means, shares
from merging.routing.install import install

WEIGHTS = (3 * drawn(40, 3, seed=1)).softmax(1)


def means_of(weights, labels):
    return torch.stack([weights[labels == label].double().mean(0) for label in range(int(labels.max()) + 1)]).float()


@pytest.mark.parametrize("per_bin", [False, True])
@pytest.mark.parametrize("count", [1, 4, 20])
def test_groups_lie_in_bins_and_carry_their_mean(count, per_bin):
    labels, means = group(WEIGHTS, count, per_bin=per_bin)
    bins = WEIGHTS.argmax(1)
    assert torch.equal(labels.unique(), torch.arange(len(means)))
    for label in range(len(means)):
        assert len(bins[labels == label].unique()) == 1
    assert close(means, means_of(WEIGHTS, labels), 1e-7)
    sizes = torch.bincount(bins, minlength=3).tolist()
    assert len(means) == (sum(min(count, size) for size in sizes) if per_bin else max(count, 3))
    again = group(WEIGHTS, count, per_bin=per_bin)
    assert torch.equal(labels, again[0]) and torch.equal(means, again[1])


@pytest.mark.parametrize("count", [40, 100])
def test_as_many_groups_as_samples_change_nothing(count):
    labels, means = group(WEIGHTS, count)
    assert len(means) == 40 and torch.equal(means[labels], WEIGHTS)
    twice = torch.cat([WEIGHTS, WEIGHTS])
    labels, means = group(twice, 2 * count)
    assert len(means) == 40 and close(means[labels], twice, 1e-7)


def test_one_hot_weights_give_one_merge_per_task():
    hard = torch.eye(3)[torch.arange(40) % 3]
    for count in (1, 3, 20):
        labels, means = group(hard, count)
        assert len(means) == 3 and torch.equal(means[labels], hard)


def test_clusters_may_be_of_the_logits():
    """Logits far apart where the weights are alike: the mean is still that of the weights."""
    logits = torch.tensor([[9.0, 0], [9, 0.1], [90, 0], [90, 0.1]])
    labels, means = group(logits.softmax(1), 2, points=logits)
    assert labels[0] == labels[1] != labels[2] == labels[3]
    assert close(means, means_of(logits.softmax(1), labels), 1e-7)


def test_k_means_finds_clusters_that_are_there():
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    truth = torch.arange(40) % 4
    for seed in range(5):
        labels = k_means(centres[truth] + 0.3 * drawn(40, 2, seed=seed), 4, seed)
        assert all(len(labels[truth == each].unique()) == 1 for each in range(4)) and len(labels.unique()) == 4


def test_shares_follow_the_sizes():
    assert shares([30, 10, 0], 8) == [6, 2, 0] and shares([5, 5], 1) == [1, 1] and shares([2, 3], 99) == [2, 3]
    assert shares([1, 9], 4) == [1, 3]


def test_outputs_keep_the_order_of_the_images():
    base, experts = small_towers()
    tower = install(BACKBONE.build(), merged_of(Twin(keep=0.5), base, experts)).use("grouped")
    images, w = drawn(12, 3, 16, 16, seed=3), WEIGHTS[:12]
    alone = torch.cat([tower(images[i : i + 1], w=w[i : i + 1]) for i in range(12)])
    labels, means = group(w, 12)
    assert close(tower(images, w=means[labels]), alone, 1e-5)
    labels, means = group(w, 4)
    grouped = torch.cat([tower(images[i : i + 1], w=means[labels[i]][None]) for i in range(12)])
    assert close(tower(images, w=means[labels]), grouped, 1e-5) and not close(grouped, alone, 1e-3)


@pytest.mark.parametrize("case", [(WEIGHTS, 0, None), (WEIGHTS[0], 2, None), (WEIGHTS, 2, WEIGHTS[:3])])
def test_what_cannot_be_grouped_is_refused(case):
    weights, count, points = case
    with pytest.raises(UserError, match="Grouping takes weights"):
        group(weights, count, points=points)
