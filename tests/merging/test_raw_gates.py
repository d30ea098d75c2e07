"""Gates that see raw inputs, as the published code of WEMoE does: transcribed, and trained."""

from dataclasses import replace

import torch
from coloured import BLOCK, PARTS, fitted, separable
from samples import Made

from merging.context import Context
from merging.fit.gates import Gradient
from merging.routing.gates import Gate, GateShape

RAW = replace(BLOCK, activation="none", granularity="batch", features="mean", standardise=False)


def test_the_published_gate_on_raw_tokens():
    """fusion_bench's WEMoE: two layers on the tokens themselves, mean over tokens, then over the batch."""
    torch.manual_seed(0)
    made = Gate(8, 4, GateShape(depth=2, features="mean", pool="after", activation="none", granularity="batch",
                                standardise=False)).double()  # fmt: skip
    x = 3 + 5 * torch.randn(6, 5, 8, dtype=torch.float64)
    made.standardise(x)  # does nothing
    first, second = made.net[0], made.net[2]
    expected = torch.zeros(4, dtype=torch.float64)
    for token in x.flatten(0, 1):
        expected += second.weight @ torch.relu(first.weight @ token + first.bias) + second.bias
    assert torch.allclose(made(x), expected / 30, rtol=0, atol=1e-12)


def test_training_looks_at_no_image_before_the_first_step():
    seen, (experts, context) = [], separable()

    def noting(split):
        found = context.unlabelled(split)
        return replace(found, inputs=lambda task, some: seen.append(task) or found.inputs(task, some))

    merged = fitted(RAW, Gradient(steps=2, lr=1e-12, batch=4), given=(experts, Context(Made(noting))))
    assert len(seen) == 1 + 2 * PARTS  # one tells how wide the tokens are
    for gate in (*merged.routing.gates, *fitted(RAW).routing.gates):  # by entropy, and by task id
        assert not gate.mean.any() and (gate.std == 1).all()
    assert all(torch.allclose(gate.net[0].bias, torch.tensor(0.3)) for gate in merged.routing.gates)
