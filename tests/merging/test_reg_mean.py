"""RegMean against the published steps on the inputs of every linear layer, and by algebra."""

import pytest
import torch
from coloured import separable
from samples import IMAGES, context, family, opened, tower
from torch import nn

from merging.context import ALONE
from merging.errors import UserError
from merging.methods import RegMean
from merging.methods.reg_mean import solved
from merging.regression import Equations

KEYS = ("mlp.c_fc.weight", "mlp.c_proj.weight")


def seen(experts, data, task, name):
    """What goes into a linear layer of expert `task` on its own images, [rows, n]."""
    module, inputs = data.tower(), []
    module.load_state_dict({key: experts.checkpoints[task].tensor(key).float() for key in module.state_dict()})
    module.get_submodule(name).register_forward_hook(lambda _, args, output: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        module(data.inputs(task, torch.arange(IMAGES)))
    return torch.cat(inputs).double()


@pytest.mark.parametrize("rho", [0.0, 0.95])
@pytest.mark.parametrize("by_block", [False, True])
def test_equals_the_published_steps(rho, by_block):
    experts, context = separable()
    merged, data = RegMean(rho, IMAGES, by_block)(experts, context), context.unlabelled()
    for block in range(2):
        for name in KEYS:
            key = f"visual.transformer.resblocks.{block}.{name}"
            total = moved = 0
            for task, checkpoint in enumerate(experts.checkpoints):
                x = seen(experts, data, task, key.removesuffix(".weight"))
                gram = x.T @ x / len(x)
                gram = rho * gram + (1 - rho) * torch.diag(torch.diag(gram))
                total, moved = total + gram, moved + gram @ checkpoint.tensor(key).double().T
            expected = (torch.linalg.inv(total) @ moved).T
            found = merged.unrounded(key).double()
            assert torch.allclose(found, expected, rtol=0, atol=1e-4), key


def test_attention_and_the_projection_are_regressed_too_and_vectors_are_averaged():
    experts, context = separable()
    merged = RegMean(samples=IMAGES)(experts, context)
    for key, spec in experts.specs().items():
        mean = experts.tau(key).mean(0)
        averaged = torch.equal(merged.shared[key], mean)
        regressed = experts.param(key).family in ("ffn", "attention", "projection") and len(spec.shape) == 2
        assert averaged == (not regressed), key


def test_equal_experts_are_their_fixed_point():
    base, experts = family(1, tower(), size=0.25, spread=0.0625)
    found = opened(base, experts * 3)
    merged = RegMean(0.95)(found, context(found))
    for key in found.specs():
        assert torch.allclose(merged.shared[key], found.task_vector(key, 0), rtol=0, atol=1e-5), key


def test_outputs_are_as_near_as_any_matrix_can_get():
    """The normal equations: the residual of the merged outputs is orthogonal to all inputs."""
    rng = torch.Generator().manual_seed(0)
    x = [torch.randn(20, 4, generator=rng, dtype=torch.float64) for _ in range(3)]
    w = [torch.randn(5, 4, generator=rng, dtype=torch.float64) for _ in range(3)]
    gram, moved = sum(a.T @ a for a in x), sum(b @ a.T @ a for a, b in zip(x, w, strict=True))
    merged = solved(Equations(gram, moved), sum(w) / 3)
    left = sum((merged - b) @ a.T @ a for a, b in zip(x, w, strict=True))
    assert torch.allclose(left, torch.zeros_like(left), atol=1e-4)  # the ridge is 1e-7 of the diagonal
    lonely, first = torch.zeros(4, 4, dtype=torch.float64), torch.tensor([1, 0, 0, 0])
    lonely[0, 0] = 2.0
    expected = torch.where(first > 0, moved / 2, sum(w) / 3)
    assert torch.allclose(solved(Equations(lonely, moved * first), sum(w) / 3), expected, rtol=1e-6)


def test_inputs_are_needed_and_recorded():
    experts, context = separable()
    with pytest.raises(UserError, match="uses unlabelled calibration inputs"):
        RegMean()(experts, ALONE)
    RegMean(samples=4)(experts, context.acting("mine", RegMean()))
    assert context.opened.splits == {"calibration": ["mine"]}
    assert isinstance(context.unlabelled().tower(), nn.Module)


@pytest.mark.parametrize("options", [{"rho": 1.5}, {"samples": 0}])
def test_bad_input(options):
    with pytest.raises(UserError, match="out of range"):
        RegMean(**options)
