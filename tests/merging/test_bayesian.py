"""Bayesian Model Merging by algebra: the ends of its prior, RegMean, and WUDI's filter."""

from dataclasses import replace

import pytest
import torch
from samples import family, models, tower
from test_regression import IMAGES, measured, merged, states

from merging import UserError, merge
from merging.context import ALONE, needs_of, splits_of
from merging.fit.black_box import BlackBox
from merging.methods import Average, Bayesian, RegMean, Swudi, TaskArithmetic, TsvM
from merging.methods.method import call
from tasks.score import Score

KEY = "encoder.layers.1.mlp.fc1.weight"
ATTENTION = "encoder.layers.1.self_attn.v_proj.weight"
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
    strong = merged(Bayesian(7.0))
    assert torch.equal(mixed[KEY], strong[KEY])
    assert torch.allclose(mixed[ATTENTION], (base[ATTENTION] + plain[ATTENTION]) / 2, atol=1e-6)


class Near:
    """Data double: inputs, and scores of how near one matrix is to a target, and how large another is."""

    def __init__(self, data, target):
        self.unlabelled, self.target = data.unlabelled, target

    def validate(self, merged):
        gap = float(
            (merged.weight(KEY) - self.target).norm()
            + (merged.weight(ATTENTION) - merged.base.tensor(ATTENTION)).norm()
        )
        return {"red": Score("nearness", -gap, 9, 0.1)}


def test_a_search_finds_the_rho_and_the_scale_of_every_family():
    """Of the FFNs those at which a target was made; none for attention."""
    target = merged(Bayesian(rhos={"ffn": 2.0}, kinds={"ffn": 0.5}))[KEY]
    experts, context = measured()
    context = replace(context, data=Near(context.data, target))
    plain, found = (call(Bayesian(search=BlackBox(trials)), experts, context) for trials in (1, 80))
    for key, weight in merged(Bayesian()).items():  # the start is the closed form
        assert torch.allclose(plain.weight(key), weight, atol=1e-5), key
    gap = lambda model: -context.data.validate(model)["red"].value  # noqa: E731
    assert gap(found) < 0.35 * gap(plain)
    (remark,) = found.remarks
    numbers = dict(pair.split() for pair in remark.split(" at ")[1].split(", "))
    assert {*numbers} == {f"{what}.{kind}" for what in ("rho", "scale") for kind in ("attention", "ffn")}
    rhos, kinds = (
        {kind: float(numbers[f"{what}.{kind}"]) for kind in ("attention", "ffn")} for what in ("rho", "scale")
    )
    again = merged(Bayesian(rhos=rhos, kinds=kinds))
    assert all(torch.allclose(found.weight(key), again[key], atol=1e-2) for key in (KEY, ATTENTION))


def test_a_search_asks_for_labels_of_validation_too():
    searching, free = Bayesian(search=BlackBox(2)), Bayesian(gram="task_vectors", search=BlackBox(2))
    assert needs_of(searching) == needs_of(free) == "labels"
    assert splits_of(searching) == ("calibration", "val") and splits_of(free) == ("val",)
    experts, _ = measured()
    with pytest.raises(UserError, match="uses validation scores, and there are none"):
        call(free, experts, ALONE)


def test_bad_input():
    experts, _ = measured()
    assert (Bayesian().needs, Bayesian(gram="task_vectors").needs) == ("inputs", "nothing")
    with pytest.raises(UserError, match="uses unlabelled calibration inputs"):
        call(Bayesian(), experts, ALONE)
    assert models(call(Bayesian(gram="task_vectors"), experts, ALONE))
    for wrong in ({"rho": 0.0}, {"rhos": {"ffn": -1.0}}, {"normaliser": "max"}):
        with pytest.raises(UserError, match=r"is unknown|out of range"):
            Bayesian(**wrong)
