"""TIES where it is delicate: ties at the threshold, exact cancellation, the trim over the whole model."""

from concurrent.futures import ThreadPoolExecutor

import published
import pytest
import torch
from samples import SHAPES, drawn, equal, family, models, task_vectors

from merging import merge, ops
from merging.methods import Ties
from merging.ops import KeepLargest


def swept(pieces):
    """Every piece worked on under its name, by two threads at a time."""
    return lambda work: ThreadPoolExecutor(2).map(work, pieces.keys(), pieces.values())


def kept(pieces, count):
    """`pieces` {name: [T, n]} after the selection under test."""
    trim = KeepLargest.find(swept(pieces), count)
    return {name: trim(name, piece.clone()) for name, piece in pieces.items()}


def keep_first_of_sorted(pieces, count):
    """The same by a stable sort of everything: largest first, earliest first among equals."""
    flat = torch.cat(list(pieces.values()), 1)
    order = flat.abs().argsort(dim=1, descending=True, stable=True)[:, :count]
    flat = torch.zeros_like(flat).scatter(1, order, flat.gather(1, order))
    return dict(zip(pieces, flat.split([piece.shape[1] for piece in pieces.values()], 1), strict=True))


@pytest.mark.parametrize("count", [1, 2, 7, 150, 299, 300])
@pytest.mark.parametrize("levels", [1, 3, 20, 1 << 18])
@pytest.mark.parametrize("most", [ops.MOST, 40, 0])
def test_keeps_exactly_the_largest(count, levels, most, monkeypatch):
    """From all entries equal in magnitude (1 level) to hardly any two equal; with and without room to remember some."""
    monkeypatch.setattr(ops, "MOST", most)
    sizes = {"a": 100, "b": 1, "c": 199}
    pieces = {name: (drawn(4, n, seed=n) * levels).round() / levels for name, n in sizes.items()}
    if levels == 1:
        pieces = {name: torch.full_like(piece, -0.5) for name, piece in pieces.items()}
    selected = kept(pieces, count)
    assert equal(selected, keep_first_of_sorted(pieces, count))
    nonzero = torch.cat(list(selected.values()), 1).count_nonzero(1)
    assert torch.all(nonzero <= count) and (levels < 1 << 18 or torch.all(nonzero == count))


def test_selects_among_extreme_magnitudes():
    """Zeros of both signs, subnormal numbers and the largest floats are ordered like all others."""
    tiny, huge = torch.finfo(torch.float32).smallest_normal / 4, torch.finfo(torch.float32).max
    piece = torch.tensor([[0.0, -0.0, tiny, -2 * tiny, 1.0, -huge, huge]])
    assert kept({"a": piece}, 3)["a"].tolist() == [[0, 0, 0, 0, 1.0, -huge, huge]]
    assert kept({"a": piece}, 4)["a"].count_nonzero() == 4 and kept({"a": piece}, 7)["a"].count_nonzero() == 5


@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999, 1.0])
def test_trim_is_global_and_keeps_the_published_count(density):
    """One large parameter takes the whole budget; the published threshold is the entry after the first floor(d k)."""
    base, experts = family(1, {"large": (30,), "small": (70,)})
    experts[0]["large"] = base["large"] + torch.arange(30, 60)
    (model,) = models(merge(Ties(density, "sum", 1.0), base, experts))
    changed = {key: int((model[key] != base[key]).sum()) for key in model}
    assert changed["large"] + changed["small"] == min(int(100 * density) + 1, 100)
    assert changed["large"] == min(sum(changed.values()), 30)


@pytest.mark.parametrize("merge_by", ["sum", "mean"])
@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_tied_magnitudes(tasks, merge_by):
    """Published code keeps all of equal magnitude at the threshold; we keep the published count, the first ones."""
    base = {key: drawn(*shape, seed=90).sign() for key, shape in SHAPES.items()}
    halves = [{key: (2 * drawn(*shape, seed=t)).round() / 2 for key, shape in SHAPES.items()} for t in range(tasks)]
    experts = [{key: base[key] + tau[key] for key in base} for tau in halves]
    taus = task_vectors(base, experts)
    pieces = {key: taus[key].reshape(tasks, -1) for key in sorted(taus)}
    total = sum(piece.shape[1] for piece in pieces.values())
    trimmed = keep_first_of_sorted(pieces, int(total * 0.3) + 1)
    change = published.ties({key: trimmed[key].view_as(taus[key]) for key in taus}, 1, merge_by, 1)
    (model,) = models(merge(Ties(0.3, merge_by, 1), base, experts))
    for key in taus:  # halves add up exactly; the mean of three rounds once
        assert torch.allclose(model[key].double(), base[key] + change[key], rtol=0, atol=1e-6), key


@pytest.mark.parametrize("majority", [1, -1, 0])
def test_entries_that_cancel_take_the_sign_of_the_model(majority):
    """Two opposite experts with one entry more that decides, in the last parameter: known only after all others."""
    base = {"a": torch.zeros(40), "b": torch.zeros(30, 2), "c": torch.zeros(1)}
    tau = {"a": drawn(40, seed=1), "b": drawn(30, 2, seed=2), "c": torch.tensor([4.0 * majority])}
    experts = [tau, {"a": -tau["a"], "b": -tau["b"], "c": tau["c"]}]
    for merge_by in ("sum", "mean"):
        change = published.ties(task_vectors(base, experts), 0.5, merge_by, 1)
        (model,) = models(merge(Ties(0.5, merge_by, 1), base, experts))
        assert equal({key: weight.double() for key, weight in model.items()}, change)
        sign = majority or -1  # as published: without a majority, the negative entries stay
        assert torch.all(model["b"] * sign >= 0) and model["b"].any()


@pytest.mark.parametrize("tasks", [2, 8])
def test_a_selection_can_be_asked_again(tasks):
    """The second look at a piece trims the same entries although the others went by in between."""
    pieces = {name: drawn(tasks, 50, seed=seed).sign() for seed, name in enumerate("abc")}
    trim = KeepLargest.find(swept(pieces), 60)
    first = {name: trim(name, piece.clone()) for name, piece in pieces.items()}
    assert trim.beyond and all(torch.equal(first[name], trim(name, pieces[name].clone())) for name in "bac")
