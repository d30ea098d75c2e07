"""Activation checkpointing runs blocks again in the backward pass: the gates have the same gradients."""

import pytest
import torch
from architectures import inputs, output
from test_routed_architectures import gated
from torch.utils.checkpoint import checkpoint

from merging.routing.gates import listening


def gradients(routed, run):
    """Those of the gates, and how often a gate answered in both passes."""
    routed.gates.requires_grad_(True)
    routed.zero_grad()
    with listening() as recorded:
        output(run()).square().sum().backward()
    return [parameter.grad.clone() for parameter in routed.gates.parameters()], len(recorded)


@pytest.mark.parametrize("sees", ["block", "early", "pass"])
@pytest.mark.parametrize("name", ["open_clip", "BERT", "Llama"])
def test_blocks_that_the_library_recomputes(name, sees):
    routed, _ = gated(name, sees, lambda key: "layer" in key or "resblocks" in key)
    kwargs = inputs(name) | ({"use_cache": False} if name == "Llama" else {})
    routed.train()
    expected, once = gradients(routed, lambda: routed(**kwargs))
    if name == "open_clip":
        routed.module.visual.set_grad_checkpointing(True)
    else:
        routed.module.gradient_checkpointing_enable()
    found, calls = gradients(routed, lambda: routed(**kwargs))
    if sees != "early":  # some libraries leave a block's own hooks out
        assert calls == (once if sees == "pass" else 2 * once)
    assert all(expected[0].flatten().tolist())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sees", ["block", "early", "pass"])
@pytest.mark.parametrize("name", ["open_clip", "BERT"])
def test_a_whole_model_that_is_recomputed(name, sees):
    routed, _ = gated(name, sees, lambda key: "layer" in key or "resblocks" in key)
    kwargs = inputs(name)
    expected, once = gradients(routed, lambda: routed(**kwargs))
    found, calls = gradients(routed, lambda: checkpoint(routed, use_reentrant=False, **kwargs))
    assert calls == 2 * once
    torch.testing.assert_close(found, expected)
