"""Which parts a gate keeps: chosen last, after tokens, batches and groups have been averaged."""

import math

import pytest
import torch
from coloured import BLOCK, QUICK, fitted, separable
from torch import nn

from merging.errors import UserError
from merging.fit.gates import Gradient, Learned
from merging.methods import RankOneMoe
from merging.routing.gates import Gate, GateShape
from merging.routing.groups import grouped

B, N, D, G = 6, 5, 8, 7  # samples, tokens, width, parts
AFTER = {"features": "mean", "pool": "after"}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gate(parts=G, **shape):
    """A gate of random weights, in fp64, that standardises nothing."""
    made = Gate(D, parts, GateShape(**shape)).double().eval()
    for index, tensor in enumerate(made.net.parameters()):
        tensor.data.copy_(drawn(*tensor.shape, seed=50 + index))
    return made


def published_soft_top_k(scores, count):
    """RankOne-MoE's `top_k_soft`, number by number: s sigmoid(100 (s - smallest of the count largest))."""
    threshold = sorted(scores, reverse=True)[count - 1]
    return [s / (1 + math.exp(min(700.0, -100 * (s - threshold)))) for s in scores]


def scores_of(made, token):
    """The linear gate of one token, by hand."""
    layer = made.net[0]
    return [sum(w * x for w, x in zip(row, token.tolist(), strict=True)) + bias
            for row, bias in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)]  # fmt: skip


def averaged(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


class TestPublishedOrder:
    """The code of rank-one MoE: mean over tokens, over the batch where it reduces it, then the soft choice."""

    @pytest.mark.parametrize("granularity", ["sample", "batch", "mixed", "token"])
    def test_average_then_choose(self, granularity):
        made, x = gate(activation="soft_top_k", top_k=5, granularity=granularity, **AFTER), drawn(B, N, D, seed=1)
        by_token = [[scores_of(made, token) for token in sample] for sample in x]
        by_sample = [averaged(tokens) for tokens in by_token]
        expected = {
            "token": [[published_soft_top_k(scores, 5) for scores in tokens] for tokens in by_token],
            "sample": [published_soft_top_k(scores, 5) for scores in by_sample],
        }.get(granularity, published_soft_top_k(averaged(by_sample), 5))
        assert torch.allclose(made(x), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)

    def test_what_lies_below_is_suppressed(self):
        """Chosen token by token and then averaged, every part would keep a share."""
        made, x = gate(activation="soft_top_k", top_k=5, **AFTER), 3 * drawn(200, N, D, seed=1)
        assert ((made(x).abs() < 1e-3).sum(1).double().mean() - 2).abs() < 0.2  # 7 - 5

    def test_as_shipped_it_is_a_share(self):
        """Three quarters of 8 x 32, 8 x 64 and 20 x 64 components: the published 192, 384 and 960."""
        shape = GateShape(activation="soft_top_k", top_k=0.75, **AFTER)
        assert [shape.kept(parts) for parts in (256, 512, 1280)] == [192, 384, 960]
        share, count = (gate(8, activation="soft_top_k", top_k=top_k, **AFTER) for top_k in (0.75, 6))
        assert torch.equal(share(drawn(B, N, D)), count(drawn(B, N, D)))


ACTIVATIONS = {"softmax": lambda s: s.softmax(-1), "sigmoid": torch.sigmoid, "none": lambda s: s}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("granularity", ["sample", "batch", "mixed", "token"])
@pytest.mark.parametrize("top_k", [1, 3, 0.4])
def test_no_more_parts_than_asked_for(activation, granularity, top_k):
    """As many as the accountant counts, and the largest of the mean."""
    made, x = gate(activation=activation, top_k=top_k, granularity=granularity, **AFTER), drawn(B, N, D, seed=1)
    found, count = made(x), made.shape.kept(G)
    assert count == made.shape.used(G) == {1: 1, 3: 3, 0.4: 3}[top_k]
    whole = ACTIVATIONS[activation](nn.functional.linear(x, made.net[0].weight, made.net[0].bias))
    whole = {"token": whole, "sample": whole.mean(1)}.get(granularity, whole.mean((0, 1)))
    best = whole.topk(count, -1).indices
    assert torch.equal(found != 0, torch.zeros_like(found).scatter(-1, best, 1.0) != 0)
    if activation == "none":
        assert torch.allclose(found.gather(-1, best), whole.gather(-1, best), rtol=0, atol=1e-12)
    else:
        assert torch.allclose(found.sum(-1), whole.sum(-1), rtol=0, atol=1e-12)
        ratio = found.gather(-1, best) / whole.gather(-1, best)
        assert torch.allclose(ratio, ratio[..., :1].expand_as(ratio), rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [2, 0.3])
def test_a_group_keeps_no_more_than_one_sample(top_k):
    """The samples of a group agree in their largest part alone."""
    made = gate(sees="early", features="mean", top_k=top_k, granularity="group", groups=2)
    labels, w = grouped(made, 2 * drawn(60, G))
    assert len(w) == int(labels.max()) + 1 and ((w != 0).sum(1) == 2).all()
    assert torch.allclose(w.sum(1), torch.ones(len(w)).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [None, G, 99])
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "soft_top_k"])
def test_all_kept_is_nothing_changed(activation, top_k):
    every, x = gate(activation="none" if activation == "soft_top_k" else activation, **AFTER), drawn(B, N, D)
    assert torch.equal(gate(activation=activation, top_k=top_k, **AFTER)(x), every(x))


def test_the_soft_choice_leaves_all_parts_at_work():
    assert GateShape(activation="soft_top_k", top_k=2, **AFTER).used(G) == G
    assert GateShape(activation="none", top_k=2, **AFTER).used(G) == 2


@pytest.mark.parametrize("top_k", [0, -1, 1.5, 1.0, 0.0, -0.5])
def test_neither_count_nor_share(top_k):
    with pytest.raises(UserError, match=rf"top_k={top_k} is out of range: keep at least 1 part .* a share"):
        GateShape(top_k=top_k)


def test_a_share_of_one_part_cannot_be_trained_by_gradient():
    shape, (experts, context) = GateShape(top_k=0.3), separable()
    with pytest.raises(UserError, match=r"top_k=0.3 gives one-hot weights.*router=task_id"):
        Learned(gate=shape, train=Gradient(steps=1)).fit(RankOneMoe(1)(experts), experts, context)
    assert fitted(shape, QUICK, given=(experts, context)).routing.gate.kept(3) == 1 and BLOCK.top_k is None
