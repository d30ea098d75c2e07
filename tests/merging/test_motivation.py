"""Active neurons, overlap of masks and energy per mode, against numbers worked out by hand or by an SVD."""

from types import SimpleNamespace

import pytest
import torch
from samples import drawn, family, tower

from merging import Experts
from merging.motivation import blocks, curve, matrices


def test_active_neurons_and_overlap_by_hand():
    """Task 0: 4 + 3 of 10 hold half; task 1: the one neuron that is active at all; signs do not matter."""
    activity = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.0, 0.0, 5.0, 0.0]])
    masks = torch.tensor([[True, True, False, False], [False, True, True, False]])
    neurons = SimpleNamespace(
        measured=lambda experts, context: {"layers.7": activity}, masks=lambda experts, context: {"layers.7": masks}
    )
    (found,) = blocks(None, None, neurons, 0.5).values()  # type: ignore[arg-type]
    assert found.hidden == 4 and found.active == [0.5, 0.25] and found.kept == 0.5
    assert found.overlap == [[1.0, 0.33333], [0.33333, 1.0]]  # one neuron of three
    assert found.chance == pytest.approx(1 / 3)


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 10, 6), (4, 3, 50), (2, 70, 8)])
def test_energy_is_that_of_singular_values(shape, mode):
    tau = drawn(*shape)
    values = torch.linalg.svdvals(tau.movedim(mode, 0).flatten(1).double()).square()
    found = curve(tau, mode)
    held = (values.cumsum(0) / values.sum())[torch.tensor(found.ranks) - 1]
    assert found.energy == pytest.approx(held.tolist(), abs=1e-5)
    assert found.ranks[-1] == len(values) and len(found.ranks) == min(32, len(values))


def test_tasks_that_share_all_need_one_direction_and_no_change_needs_none():
    same = drawn(6, 5).expand(4, 6, 5)
    assert curve(same, 0).energy == [1.0] * 4
    apart = torch.zeros(4, 4, 4)
    apart[range(4), range(4), range(4)] = 1  # one entry each, in rows and columns of their own
    assert all(curve(apart, mode).energy == [0.25, 0.5, 0.75, 1.0] for mode in range(3))
    assert curve(torch.zeros(3, 4, 5), 1).energy == [1.0] * 4


def test_the_matrices_are_those_of_the_ffns():
    base, experts = family(3, tower())
    found = matrices(Experts.open(base, experts))
    names = [f"transformer.resblocks.{block}.mlp.{name}.weight" for block in (0, 1) for name in ("c_fc", "c_proj")]
    assert [key.removeprefix("visual.") for key in found] == names
    key = next(iter(found))
    tau = torch.stack([expert[key] - base[key] for expert in experts])
    assert found[key].shape == [*tau.shape] and found[key].modes["in"] == curve(tau, 2)
