"""LOT Merging and RegMean++ against their published steps on a whole model, and the equations they share by algebra."""

from functools import cache

import published_regression as published
import pytest
import torch
from samples import Made, context, drawn, equal, models, opened
from tiny_models import backbone

from merging.calibration import Calibration
from merging.context import ALONE
from merging.errors import UserError
from merging.methods import Lot, RegMean, RegMeanPp
from merging.methods.lot import solved
from merging.methods.method import call
from merging.regression import Equations

TASKS, IMAGES = ("red", "green", "blue"), 24
BACKBONE = backbone("CLIPVisionModel")


@cache
def states():
    """A base and three experts."""
    torch.manual_seed(0)
    base = BACKBONE.build().state_dict()
    noisy = lambda seed: {key: w + 0.125 * drawn(*w.shape, seed=seed + i) for i, (key, w) in enumerate(base.items())}  # noqa: E731
    base, *experts = (noisy(100 * seed) for seed in range(1 + len(TASKS)))
    return base, experts


@cache
def pictures(task):
    images = drawn(IMAGES, 3, 8, 8, seed=task)
    images[:, task] += 1
    return images


def measured(made=None, tasks=TASKS):
    """Experts and a context with their images."""
    base, experts = made or states()
    heads = (None,) * len(tasks)
    data = Calibration("calibration", tasks, (IMAGES,) * len(tasks), lambda task, some: pictures(task)[some], heads,
                       BACKBONE.build, BACKBONE.identity())  # fmt: skip
    experts = opened(base, experts, tasks)
    return experts, context(experts, Made(lambda split: data))


def merged(method, made=None, tasks=TASKS):
    """The state dict that a method makes."""
    return models(call(method, *measured(made, tasks)))[0]


def assert_near(model, expected, atol=1e-4):
    for key, weight in model.items():
        assert torch.allclose(weight.double(), expected[key].double(), rtol=0, atol=atol), key


@pytest.mark.parametrize(("cutoff", "scale"), [(1e-5, 1.0), (0.05, 1.2)])
def test_lot_equals_the_published_steps(cutoff, scale):
    base, experts = states()
    images = [pictures(task) for task in range(len(TASKS))]
    expected = published.lot(BACKBONE.build, base, experts, images, cutoff, scale)
    assert_near(merged(Lot(IMAGES, cutoff, scale)), expected)


@pytest.mark.parametrize("rho", [0.95, 0.1])
def test_reg_mean_pp_equals_the_published_steps(rho):
    base, experts = states()
    images = [pictures(task) for task in range(len(TASKS))]
    assert_near(merged(RegMeanPp(rho, IMAGES)), published.reg_mean_pp(BACKBONE.build, base, experts, images, rho))


def test_all_three_are_the_same_for_matrices_of_the_first_block_that_see_the_same():
    """With experts that differ in nothing before a matrix, and as many rows as make its Gram matrix regular."""
    base, experts = states()
    key = "encoder.layers.0.self_attn.q_proj.weight"
    alike = [{**base, key: expert[key]} for expert in experts]
    lot, plain, blocks = (merged(m, (base, alike)) for m in (Lot(IMAGES, 1e-9), RegMean(1.0), RegMeanPp(1.0)))
    assert torch.allclose(lot[key], plain[key], atol=1e-4) and torch.allclose(plain[key], blocks[key], atol=1e-6)
    assert not torch.allclose(plain[key], sum(state[key] for state in alike) / 3, atol=1e-3)


def test_equal_experts_are_a_fixed_point():
    """Of LOT in what the model answers: where no input lies it keeps the base."""
    base, experts = states()
    assert_near(merged(RegMeanPp(), (base, experts[:1] * 3)), experts[0], 1e-3)
    with torch.no_grad():
        ours, theirs = (
            published.loaded(BACKBONE.build, state)(pictures(0)).last_hidden_state
            for state in (merged(Lot(IMAGES), (base, experts[:1] * 3)), experts[0])
        )
    assert torch.allclose(ours, theirs, atol=0.01) and not torch.allclose(ours[0], theirs[1], atol=0.1)


def test_orthogonal_feature_spaces_keep_every_task():
    """X_t (T* - tau_t) = 0, and nothing moves where no input lies."""
    basis = torch.linalg.qr(drawn(12, 12).double())[0]
    xs = [drawn(20, 3, seed=t).double() @ basis[3 * t : 3 * t + 3] for t in range(3)]
    taus = drawn(3, 5, 12, seed=9).double()
    total = Equations()
    for x, tau in zip(xs, taus, strict=True):
        total = total.plus(x.T @ x, tau @ x.T @ x)
    change = solved(total, 1e-6)
    for x, tau in zip(xs, taus, strict=True):
        assert torch.allclose(x @ change.T, x @ tau.T, atol=1e-9)
    assert torch.allclose(change @ basis[9:].T, torch.zeros(5, 3).double(), atol=1e-9)


def test_one_task_is_projected_onto_the_row_space_of_its_inputs():
    x, tau = drawn(4, 9).double(), drawn(5, 9, seed=1).double()
    projection = torch.linalg.pinv(x) @ x
    assert torch.allclose(solved(Equations().plus(x.T @ x, tau @ x.T @ x), 1e-6), tau @ projection, atol=1e-9)


def test_the_ends_of_the_ridge():
    """Towards zero the minimum, towards infinity the anchor; of nothing seen the anchor too."""
    x, tau, anchor = drawn(30, 6).double(), drawn(4, 6, seed=1).double(), drawn(4, 6, seed=2).double()
    total = Equations().plus(x.T @ x, tau @ x.T @ x, 3.0)
    assert torch.allclose(total.around(anchor).regularised(1e-9), tau, atol=1e-6)
    assert torch.allclose(total.around(anchor).regularised(1e9), anchor, atol=1e-6)
    nothing = Equations().plus(torch.zeros(6, 6).double(), torch.zeros(4, 6).double())
    assert torch.equal(nothing.around(anchor).regularised(0.1), anchor)
    assert torch.equal(nothing.around(anchor).nearest(1e-5), anchor)


@pytest.mark.parametrize("method", [Lot(), RegMeanPp()])
def test_inputs_are_needed_and_results_repeat(method):
    experts, found = measured()
    with pytest.raises(UserError, match="uses unlabelled calibration inputs"):
        call(method, experts, ALONE)
    assert equal(*(models(call(method, experts, found))[0] for _ in range(2)))


@pytest.mark.parametrize("build", [lambda: Lot(samples=0), lambda: Lot(cutoff=2.0), lambda: RegMeanPp(rho=-1)])
def test_bad_input(build):
    with pytest.raises(UserError, match="out of range"):
        build()
