"""WUDI-Merging against the authors' steps, written down with autograd, and by algebra."""

import pytest
import torch
from samples import drawn, family, opened, task_vectors, tower

from merging import merge
from merging.errors import UserError
from merging.methods import Wudi
from merging.methods.wudi import least_interference


def published(tau, steps, lr):
    """get_redundant_task_vector of the official vit/wudi_main.py."""
    merging_vector = torch.nn.Parameter(tau.sum(0))
    optimizer = torch.optim.Adam([merging_vector], lr=lr, weight_decay=0)
    norms = torch.norm(tau.reshape(tau.shape[0], -1), p=2, dim=-1) ** 2
    for _ in range(steps):
        disturbing = merging_vector.unsqueeze(0) - tau
        inner = torch.matmul(disturbing, tau.transpose(1, 2))
        loss = torch.sum(inner**2 / norms.unsqueeze(-1).unsqueeze(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return merging_vector.data


@pytest.mark.parametrize("shape", [(3, 6, 9), (2, 9, 4), (1, 5, 5)])
def test_equals_the_published_steps(shape):
    tau = drawn(*shape).double()
    for steps in (0, 1, 50):
        assert torch.allclose(least_interference(tau, steps, 1e-2), published(tau, steps, 1e-2), rtol=0, atol=1e-9)


def test_one_task_is_itself_and_orthogonal_row_spaces_are_added_up():
    tau = drawn(1, 4, 6)
    assert torch.allclose(least_interference(tau, 20, 1e-3), tau[0], rtol=0, atol=1e-6)
    apart = torch.zeros(2, 4, 6)
    apart[0, :, :3], apart[1, :, 3:] = drawn(4, 3), drawn(4, 3, seed=1)
    assert torch.allclose(least_interference(apart, 20, 1e-6), apart.sum(0), rtol=0, atol=3e-5)


def test_the_loss_falls_and_a_task_of_zeros_has_no_say():
    tau = drawn(4, 8, 10).double()

    def loss(x):
        return sum(float(((x - t) @ t.T).square().sum() / t.square().sum()) for t in tau)

    losses = [loss(least_interference(tau, steps, 1e-2)) for steps in (0, 10, 100)]
    assert losses[0] > losses[1] > losses[2]
    with_zeros = torch.cat([tau, torch.zeros(1, 8, 10, dtype=torch.float64)])
    assert torch.equal(least_interference(with_zeros, 30, 1e-2), least_interference(tau, 30, 1e-2))


def test_its_steps_do_not_grow_with_the_task_vectors():
    """With a rate that does, the merge would be as large as they are; with the same, it nears their sum."""
    tau = drawn(3, 6, 9).double()
    grown = least_interference(1000 * tau, 30, 1000 * 1e-3)
    assert torch.allclose(grown, 1000 * least_interference(tau, 30, 1e-3), rtol=1e-6, atol=1e-3)
    assert float((least_interference(1000 * tau, 30, 1e-3) - 1000 * tau.sum(0)).abs().max()) <= 30 * 1e-3


def test_a_coefficient_multiplies_the_change_and_none_is_the_default():
    base, experts = family(3, tower())
    plain, scaled = (merge(Wudi(steps=2, scale=scale), base, experts) for scale in (None, 0.4))
    assert plain.scale is None and scaled.scale == 0.4
    assert all(torch.equal(plain.shared[key], scaled.shared[key]) for key in plain.shared)


def test_what_is_merged():
    base, experts = family(3, tower())
    tau, merged = task_vectors(base, experts), dict(merge(Wudi(steps=2), base, experts).state())
    mean = dict(merge(Wudi(steps=2, matrices="all", rest="mean"), base, experts).state())
    assert opened(base, experts).param("visual.proj").kind == "projection"
    for key in tau:
        linear = tau[key].ndim == 3 and (".mlp." in key or ".attn." in key)
        alone = least_interference(tau[key].float(), 2, 1e-5) if tau[key].ndim == 3 else tau[key].mean(0).float()
        expected = alone if linear else torch.zeros_like(base[key])
        assert torch.allclose(merged[key], base[key] + expected, rtol=0, atol=1e-6), key
        assert torch.allclose(mean[key], base[key] + alone, rtol=0, atol=1e-6), key


@pytest.mark.parametrize(
    ("options", "message"),
    [({"matrices": "some"}, "Choose one of linear, all"), ({"rest": "sum"}, "base, mean"), ({"lr": 0.0}, "lr=0.0")],
)
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        Wudi(**options)
