"""Decompositions as an accelerator computes them, here on the CPU, against those of the CPU."""

import pytest
import torch
from stacks import gaussian, structured

from merging.decompose import accelerated, cached
from merging.decompose.tucker import tucker
from merging.experts import Experts
from merging.methods import Duet, IsoC, IsoCts, TsvM, Twin

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize(
    "stack, ranks",
    [(gaussian(4, 30, 12), (4, 6, 5)), (gaussian(4, 12, 30, seed=1), (4, 5, 6)), (structured(5, 20, 14), (2, 5, 4)),
     (structured(2, 50, 12), (2, 7, 4)), (gaussian(3, 17, 1), (3, 2, 1)), (gaussian(3, 9, 8), (3, 9, 8))],
)  # fmt: skip
def test_tucker_keeps_as_much_energy_as_on_the_cpu(stack, ranks):
    there, here = accelerated.tucker(stack, ranks), tucker(stack, ranks)
    errors = [float((stack - found.dense()).norm() / stack.norm()) for found in (there, here)]
    assert errors[0] == pytest.approx(errors[1], abs=2e-3)
    for factor in (there.task, there.out, there.in_):
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]), **CLOSE)
    assert [*there.core.shape] == [*ranks]


@pytest.mark.parametrize(
    "method", [TsvM(), IsoC(), IsoCts(), Twin(rank=2), Duet(static=False)], ids=lambda method: type(method).__name__
)
def test_methods_decompose_on_the_device_of_the_experts(method, monkeypatch):
    """All decompositions of a merge ask for the device, and get what an accelerator would compute."""
    devices = set()

    def on(device, function, tensor, *options):
        devices.add(device)
        tuckers = getattr(function, "func", None) is tucker
        return (accelerated.tucker if tuckers else function)(tensor, *options)

    weight = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    states = [{weight: gaussian(1, 24, 16, seed=seed)[0]} for seed in range(4)]
    experts = Experts.open(states[0], states[1:])
    here = method(experts)
    monkeypatch.setattr(cached, "on", on)
    merged = method(Experts.open(states[0], states[1:], device=torch.device("cuda")))
    assert devices == {torch.device("cuda")}
    gate = torch.tensor([0.2, 0.3, 0.5]) if merged.deltas else None
    torch.testing.assert_close(merged.weight(weight, gate), here.weight(weight, gate), **CLOSE)
