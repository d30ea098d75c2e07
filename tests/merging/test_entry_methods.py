"""Methods that look at one entry of all experts at a time, against their published steps and in closed form."""

import published as all_entries
import published_entries as published
import pytest
import torch
from samples import SHAPES, drawn, equal, family, models, task_vectors

from merging import UserError, merge
from merging.methods import Average, Consensus, MagMax, Pcb, Ram, Sce, TaskArithmetic, Ties

ROUNDING = 1e-6  # as in test_methods


def sparse_family(tasks, shapes=SHAPES):
    """Experts of which every one leaves most entries alone."""
    base, experts = family(tasks, shapes)
    for task, expert in enumerate(experts):
        for key in shapes:
            moved = drawn(*shapes[key], seed=77 * task + len(key)) > 0.6
            expert[key] = torch.where(moved, expert[key], base[key])
    return base, experts


def summed(taus):
    return all_entries.task_arithmetic(taus, 1)


CASES = [
    pytest.param(MagMax(), lambda taus: published.mag_max(taus, 0.5), id="magmax"),
    pytest.param(Consensus(), lambda taus: published.consensus(taus, summed(taus), 0.4, 2, 0.3), id="consensus"),
    pytest.param(
        Consensus("ties", 0.6, 1, 0.3, 0.5),
        lambda taus: published.consensus(taus, all_entries.ties(taus, 0.3, "sum", 1), 0.6, 1, 0.5),
        id="consensus ties",
    ),
    pytest.param(Pcb(), lambda taus: published.pcb(taus, 0.05, 0.01, "normalised", 1.2), id="pcb"),
    pytest.param(Pcb(0.1, 0.0001, "raw"), lambda taus: published.pcb(taus, 0.1, 0.0001, "raw", 1.2), id="pcb raw"),
    pytest.param(Sce(), lambda taus: published.sce(taus, 1.0), id="sce"),
    pytest.param(Sce(0.3), lambda taus: published.sce(taus, 0.3), id="sce selects"),
    pytest.param(Ram(), lambda taus: published.ram(taus, 1e-5, 1.0), id="ram"),
    pytest.param(Ram(factor=1.2), lambda taus: published.ram(taus, 1e-5, 1.2), id="ram+"),
    pytest.param(Ram(0.5, 1.1, 0.2, "parameter"), lambda taus: published.ram(taus, 0.5, 1.1, 0.2, True), id="mergekit"),
]


@pytest.mark.parametrize(("method", "reference"), CASES)
@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("drawn_family", [family, sparse_family])
def test_equals_the_published_steps(method, reference, tasks, drawn_family):
    base, experts = drawn_family(tasks)
    change = reference(task_vectors(base, experts))
    for key, weight in merge(method, base, experts).state():
        assert torch.allclose(weight.double(), base[key] + change[key], rtol=0, atol=ROUNDING), key


@pytest.mark.parametrize("method", [MagMax(1.0), Ram(), Ram(factor=1.2)])
def test_one_task_and_equal_experts_are_the_expert(method):
    base, (expert,) = family(1)
    for experts in ([expert], [expert, expert, expert]):
        assert equal(*models(merge(method, base, experts)), {key: expert[key] for key in SHAPES})


def test_magmax_is_equivariant_and_positive_where_magnitudes_are_equal():
    base, experts = family(4)
    turned = [{key: 2 * base[key] - expert[key] if expert[key].is_floating_point() else expert[key] for key in expert}
              for expert in experts]  # fmt: skip
    first, second = models(merge(MagMax(), base, experts))[0], models(merge(MagMax(), base, turned))[0]
    assert all(torch.allclose(first[key] - base[key], base[key] - second[key], atol=ROUNDING) for key in SHAPES)
    base, tau = {"w": torch.zeros(3)}, torch.tensor([1.0, -2.0, 0.0])
    assert merge(MagMax(1.0), base, [{"w": tau}, {"w": -tau}]).weight("w").tolist() == [1.0, 2.0, 0.0]


@pytest.mark.parametrize(("merged", "plain"), [("sum", TaskArithmetic()), ("ties", Ties())])
def test_consensus_between_all_entries_and_none(merged, plain):
    """Every task uses an entry where all agree about it; beyond all tasks nothing is kept."""
    base, experts = family(3)
    everything = merge(Consensus(merged, least=0), base, experts)
    assert equal(*models(everything), *models(merge(plain, base, experts)))
    nothing = merge(Consensus(merged, least=4), base, experts)
    assert equal(*models(nothing), {key: base[key] for key in SHAPES})
    same = merge(Consensus(threshold=0.4, least=3), base, [experts[0]] * 3)
    assert all(torch.allclose(same.weight(key), base[key] + 0.9 * (experts[0][key] - base[key]), atol=ROUNDING)
               for key in SHAPES)  # fmt: skip


def test_ram_of_disjoint_changes_is_their_sum_and_of_dense_ones_the_mean():
    base, experts = family(3)
    (dense,), (mean,) = models(merge(Ram(0.0), base, experts)), models(merge(Average(), base, experts))
    assert all(torch.allclose(dense[key], mean[key], rtol=0, atol=ROUNDING) for key in SHAPES)
    for task, expert in enumerate(experts):
        for key in SHAPES:
            mine = torch.arange(expert[key].numel()).reshape(expert[key].shape) % 3 == task
            expert[key] = torch.where(mine, expert[key], base[key])
    plus, added = merge(Ram(factor=3.0), base, experts), merge(TaskArithmetic(1.0), base, experts)
    assert all(torch.allclose(plus.weight(key), added.weight(key), rtol=0, atol=ROUNDING) for key in SHAPES)


def test_pcb_of_one_task_is_what_it_keeps_clipped():
    base, (expert,) = family(1)
    tau = torch.cat([(expert[key] - base[key]).flatten() for key in sorted(SHAPES)])
    merged = merge(Pcb(0.2, 0.1, scale=1.0), base, [expert])
    change = torch.cat([(merged.weight(key) - base[key]).flatten() for key in sorted(SHAPES)])
    ordered, size = tau.abs().sort().values, len(tau)
    high = ordered[int(size * 0.9 - 1)]
    kept = change.abs() > ROUNDING
    assert torch.allclose(change[kept], tau[kept].clamp(-high, high), rtol=0, atol=ROUNDING)
    assert 0 < kept.sum() < 0.2 * size + 1 and tau.abs()[kept].min() > ordered[int(size * 0.7)]


def test_pcb_follows_the_order_of_tasks_and_the_sign_of_all():
    base, experts = family(3)
    turned = [{key: 2 * base[key] - state[key] if key in SHAPES else state[key] for key in state} for state in experts]
    (first,), (second,) = models(merge(Pcb(), base, experts)), models(merge(Pcb(), base, turned[::-1]))
    assert all(torch.allclose(first[key] + second[key], 2 * base[key], rtol=0, atol=4 * ROUNDING) for key in SHAPES)


def test_sce_of_equal_experts_and_of_opposite_ones():
    base, (expert,) = family(1)
    for experts in ([expert], [expert] * 3):
        (model,) = models(merge(Sce(), base, experts))
        assert all(torch.allclose(model[key], expert[key], rtol=0, atol=ROUNDING) for key in SHAPES)
        assert equal(*models(merge(Sce(0.5), base, experts)), {key: base[key] for key in SHAPES})  # nothing varies
    base, tau = {"w": torch.zeros(4)}, torch.tensor([1.0, -2.0, 0.0, 3.0])
    merged = merge(Sce(), base, [{"w": tau}, {"w": -tau}]).weight("w")  # a sum of zero counts as positive
    assert torch.equal(merged, tau.abs())


def test_options_out_of_range():
    with pytest.raises(UserError, match=r"ram: factor=0.5 is out of range"):
        Ram(factor=0.5)
    with pytest.raises(UserError, match=r"ram: scope='tensor' is unknown. Choose one of model, parameter"):
        Ram(scope="tensor")
