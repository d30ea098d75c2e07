"""Bayesian Model Merging by algebra: the ends of its prior, RegMean, and WUDI's filter."""

import pytest
import torch
from samples import family, models, tower
from test_regression import IMAGES, measured, merged, states

from merging import UserError, merge
from merging.context import ALONE
from merging.methods import Average, Bayesian, RegMean, Swudi, TaskArithmetic, TsvM
from merging.methods.method import call

KEY = "encoder.layers.1.mlp.fc1.weight"
MATRIX = "visual.transformer.resblocks.1.mlp.c_fc.weight"


def by_hand(rho, normaliser, anchor):
    """W of one matrix, with plain inverses."""
    experts, (found, context) = states()[1], measured()
    data = context.unlabelled()
    left, right = rho * torch.eye(8).double(), rho * anchor.double()
    for task, state in enumerate(experts):
        model, rows = data.model(found.checkpoints[task]), []
        module = model.get_submodule(KEY.removesuffix(".weight"))
        module.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].flatten(0, -2).double()))
        with torch.no_grad():
            model(data.inputs(task, torch.arange(IMAGES)))
        gram = rows[0].T @ rows[0] / len(rows[0])
        gram = gram / {"none": 1, "frobenius": gram.square().sum().sqrt(), "trace": gram.diagonal().sum()}[normaliser]
        left, right = left + gram, right + state[KEY].double() @ gram
    return right @ torch.linalg.inv(left)


@pytest.mark.parametrize("normaliser", ["none", "frobenius", "trace"])
@pytest.mark.parametrize("rho", [0.01, 1.0])
def test_equals_the_described_steps(rho, normaliser):
    base, experts = states()
    anchor = base[KEY] + 0.3 * sum(expert[KEY] - base[KEY] for expert in experts)
    found = merged(Bayesian(rho, normaliser=normaliser))[KEY]
    assert torch.allclose(found.double(), by_hand(rho, normaliser, anchor), rtol=0, atol=1e-5)


def test_the_ends_are_the_anchor_and_reg_mean():
    base, experts = family(3, tower(), size=0.25, spread=0.0625)
    strong, anchor = (
        merge(method, base, experts) for method in (Bayesian(1e9, gram="task_vectors", anchor=TsvM()), TsvM())
    )
    for key, weight in anchor.state():
        assert torch.allclose(strong.weight(key), weight, atol=1e-6), key
    weak = merged(Bayesian(1e-7, normaliser="none", anchor=Average()))
    for key, weight in merged(RegMean(1.0)).items():
        assert torch.allclose(weak[key], weight, atol=1e-3), key


def test_with_the_gram_matrices_of_task_vectors_it_is_the_filter_of_swudi():
    base, experts = family(3, tower())
    bayesian = Bayesian(0.01, gram="task_vectors", normaliser="trace", anchor=TaskArithmetic(1.0))
    ours = merge(bayesian, base, experts).weight(MATRIX)
    theirs = merge(Swudi("tikhonov", ridge=0.01, kept=1.0, matrices="linear"), base, experts).weight(MATRIX)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_kinds_have_priors_and_scales_of_their_own_and_blocks_one_by_one_are_the_same():
    base, _ = states()
    plain, blocks = merged(Bayesian()), merged(Bayesian(by_block=True))
    assert all(torch.allclose(plain[key], blocks[key], atol=1e-6) for key in plain)
    mixed = merged(Bayesian(rhos={"ffn": 7.0}, kinds={"attention": 0.5}))
    strong, attention = merged(Bayesian(7.0)), "encoder.layers.1.self_attn.v_proj.weight"
    assert torch.equal(mixed[KEY], strong[KEY])
    assert torch.allclose(mixed[attention], (base[attention] + plain[attention]) / 2, atol=1e-6)


def test_bad_input():
    experts, _ = measured()
    assert (Bayesian().needs, Bayesian(gram="task_vectors").needs) == ("inputs", "nothing")
    with pytest.raises(UserError, match="uses unlabelled calibration inputs"):
        call(Bayesian(), experts, ALONE)
    assert models(call(Bayesian(gram="task_vectors"), experts, ALONE))
    for wrong in ({"rho": 0.0}, {"rhos": {"ffn": -1.0}}, {"normaliser": "max"}):
        with pytest.raises(UserError, match=r"is unknown|out of range"):
            Bayesian(**wrong)
