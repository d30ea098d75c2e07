"""DuetMerging against its published steps and the identities that hold whatever the factors are."""

from dataclasses import replace

import pytest
import torch
from ffns import (
    ATOL,
    BLOCKS,
    EXACT,
    FFN,
    GIVEN,
    MASKS,
    MATRICES,
    SHAPES,
    SMALL,
    TASKS,
    WIDE,
    Given,
    W,
    approximations,
    close,
    filled,
    published,
    small_towers,
)
from samples import BACKBONE, context, drawn, equal, family, merged_of, opened, task_vectors

from merging.decompose.ranks import Ranks
from merging.deltas import Dense, LowRank, Tucker
from merging.merged import Routing
from merging.methods import Duet, TaskArithmetic, Wemoe
from merging.neurons import Neurons
from merging.routing.gates import Gate, GateShape
from merging.routing.install import attach, install


@pytest.fixture(scope="module")
def models():
    return family(TASKS, SHAPES)


@pytest.mark.parametrize("average", ["all", "kept"])
@pytest.mark.parametrize("scale", ["inverse_density", "energy", "density", "none"])
@pytest.mark.parametrize("task", [3, 2])
def test_equals_the_published_steps(models, task, scale, average):
    base, experts = models
    ranks = Ranks("absolute", 4, task=task)
    method = Duet(ranks=ranks, engine="hosvd", neurons=Given(scale=scale), average=average, static_coef=0.5)
    merged = merged_of(method, base, experts)
    taus = task_vectors(base, experts)
    for key in MATRICES:
        mask, down = MASKS[key.partition(".mlp")[0]], "c_proj" in key
        dynamic, static = published(taus[key], (task, 4, 4), mask, down, scale, average, W.double())
        assert close(merged.weight(key, W) - base[key], dynamic + 0.5 * static, 1e-5), key
        assert close(merged.fixed[key], 0.5 * static), key


def test_every_ffn_matrix_is_one_tensor_of_its_own(models):
    merged = merged_of(Duet(ranks=Ranks("absolute", 4, in_value=3), neurons=GIVEN), *models)
    assert list(merged.deltas) == sorted(FFN)
    for key, delta in merged.deltas.items():
        if key in MATRICES:
            assert isinstance(delta, Tucker)
            (m, n), shapes = SHAPES[key], [tuple(tensor.shape) for tensor in delta.buffers()]
            assert shapes == [(3, 4, 3), (3, 3), (m, 4), (n, 3)]
        else:
            assert isinstance(delta, Dense)
    assert merged.fixed.keys() == merged.energy.keys() == set(MATRICES)


@pytest.mark.parametrize("factors", ["tucker", "svd"])
def test_full_ranks_give_every_expert_and_task_arithmetic(models, factors):
    base, experts = models
    merged = merged_of(Duet(ranks=EXACT, factors=factors, neurons=GIVEN), base, experts)
    arithmetic, wemoe = merged_of(TaskArithmetic(0.3), base, experts), merged_of(Wemoe(), base, experts)
    for key in FFN:
        for task, expert in enumerate(experts):
            assert close(merged.weight(key, merged.one_hot(task)), expert[key]), key
        assert close(merged.weight(key, torch.full((TASKS,), 0.3)), arithmetic.weight(key)), key
        assert close(merged.weight(key, W), wemoe.weight(key, W), 1e-5), key
    assert all(fixed.abs().max() < ATOL for fixed in merged.fixed.values())
    assert all(share > 1 - 1e-9 for shares in merged.energy.values() for share in shares)


def test_ranks_of_the_short_side_are_not_full(models):
    base, experts = models
    merged = merged_of(Duet(ranks=Ranks("fraction", 1.0), neurons=GIVEN), base, experts)
    for key in MATRICES:
        assert not close(merged.deltas[key].mix(merged.one_hot(0)), experts[0][key] - base[key], 0.1), key


def test_fewer_task_ranks_mix_the_tasks_by_a_projector(models):
    """sum_s (P w)_s D~_s with P = U U^T of the tasks and D~ the tensor projected on the other two sides."""
    base, experts = models
    merged = merged_of(Duet(ranks=Ranks("absolute", 4, task=2), neurons=GIVEN), base, experts)
    for key, tau in task_vectors(base, experts).items():
        if key not in MATRICES:
            continue
        u, out, into = (merged.deltas[key].get_buffer(name).double() for name in ("task", "out", "into"))
        sides = (out @ out.T) @ tau @ (into @ into.T)
        mixed = torch.einsum("s,smn->mn", u @ u.T @ W.double(), sides)
        assert close(merged.deltas[key].mix(W), mixed, 1e-5), key
        assert not close(mixed, torch.einsum("s,smn->mn", W.double(), sides), 0.1), key
        assert (u.T @ W.double()).norm() < W.norm()


def test_task_factors_of_full_rank_are_a_gauge(models):
    """Any rotation of the tasks, undone in the core, changes nothing."""
    merged = merged_of(Duet(ranks=SMALL, neurons=GIVEN), *models)
    rotation = torch.linalg.qr(drawn(TASKS, TASKS))[0]
    for key in MATRICES:
        delta = merged.deltas[key]
        turned = Tucker(
            torch.einsum("ab,bmn->amn", rotation.T, delta.core), delta.task @ rotation, delta.out, delta.into
        )
        assert close(turned.mix(W), delta.mix(W), 1e-5)


@pytest.mark.parametrize("task", ["full", 2])
@pytest.mark.parametrize("factors", ["tucker", "svd"])
def test_weights_act_linearly(models, factors, task):
    merged = merged_of(Duet(ranks=replace(SMALL, task=task), factors=factors, neurons=GIVEN), *models)
    for key in MATRICES:
        by_task = torch.einsum("t,tmn->mn", W, approximations(merged, key))
        assert close(merged.weight(key, W), merged.static(key) + by_task, 1e-5), key


@pytest.mark.parametrize("ranks", [SMALL, EXACT], ids=["small", "exact"])
def test_starts_at_task_arithmetic(ranks):
    base, experts = small_towers()
    merged = merged_of(Duet(ranks=ranks, neurons=Neurons(0.25), init=0.3), base, experts)
    gates = torch.nn.ModuleList(Gate(16, TASKS, GateShape(activation="none"), 0.3) for _ in range(2))
    for gate in gates:
        torch.nn.init.zeros_(gate.net[-1].weight)
    routed = install(BACKBONE.build(), merged)
    attach(routed, Routing("entropy", gate=GateShape(activation="none"), gates=gates))
    start = {key: merged.weight(key, torch.full((TASKS,), 0.3)) for key in merged.specs}
    images = drawn(6, 3, 16, 16, seed=5)
    assert close(routed.eval()(images), filled(start)(images), 1e-5)
    arithmetic = filled(dict(merged_of(TaskArithmetic(0.3), base, experts).state()))(images)
    assert close(routed(images), arithmetic, 1e-5) == (ranks is EXACT)


@pytest.mark.parametrize("factors", ["tucker", "svd"])
def test_the_order_of_hidden_neurons_means_nothing(factors):
    """Measured masks included: catches swapped axes, transposed factors and wrong unfoldings."""
    base, experts = small_towers()
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(block)) for block in (0, 1)]

    def turned(state):
        found = dict(state)
        for block, order in enumerate(orders):
            stem = f"visual.transformer.resblocks.{block}.mlp."
            for name in ("c_fc.weight", "c_fc.bias"):
                found[stem + name] = state[stem + name][order]
            found[stem + "c_proj.weight"] = state[stem + "c_proj.weight"][:, order]
        return found

    method = Duet(ranks=Ranks("fraction", 0.3), factors=factors, neurons=Neurons(0.25))
    first = merged_of(method, base, experts)
    second = merged_of(method, turned(base), [turned(expert) for expert in experts])
    states = [{key: merged.weight(key, W) for key in merged.specs} for merged in (first, second)]
    assert all(close(tensor, states[1][key], 1e-5) for key, tensor in turned(states[0]).items())
    assert not any(equal({"": first.fixed[key]}, {"": second.fixed[key]}) for key in first.fixed if "c_fc" in key)
    images = drawn(4, 3, 16, 16, seed=6)
    assert close(*(install(BACKBONE.build(), merged)(images, w=W) for merged in (first, second)), 1e-4)


def test_the_correction_lives_on_the_neurons_that_were_kept():
    base, experts = small_towers()
    method = Duet(ranks=SMALL, neurons=Neurons(0.1))
    merged = merged_of(method, base, experts)
    masks = method.neurons.masks(opened(base, experts), context(opened(base, experts)))
    for key, fixed in merged.fixed.items():
        mask = masks[key.partition(".mlp")[0]]
        assert mask.sum(1).tolist() == [6] * TASKS  # round(0.1 x 64)
        used = fixed.abs().amax(0 if "c_proj" in key else 1) > 0
        assert torch.equal(used, mask.any(0)), key


@pytest.mark.parametrize("factors", ["tucker", "svd"])
def test_the_residual_is_what_inference_leaves(models, factors):
    """With all neurons kept, correction = mean_t (W_t - W_0 - X'_t), bit for bit from the stored factors."""
    base, experts = models
    everyone = dict.fromkeys(BLOCKS, torch.ones(TASKS, WIDE, dtype=torch.bool))
    merged = merged_of(Duet(ranks=SMALL, factors=factors, neurons=Given(given=everyone)), base, experts)
    for key in MATRICES:
        total, shares = torch.zeros(SHAPES[key]), []
        for task, expert in enumerate(experts):
            tau, own = expert[key] - base[key], merged.deltas[key].mix(merged.one_hot(task))
            total += tau - own
            shares.append(1 - float((tau - own).square().sum() / tau.square().sum()))
            assert close(base[key] + own + (tau - own), expert[key])
        assert torch.equal(merged.fixed[key], total / TASKS), key
        assert merged.energy[key] == pytest.approx(shares, abs=1e-6)


def test_the_correction_is_folded_and_costs_nothing():
    base, experts = small_towers()
    with_it = merged_of(Duet(neurons=Neurons(0.25)), base, experts)
    without = merged_of(Duet(static=False), base, experts)
    assert with_it.params == without.params and with_it.stored_bytes == without.stored_bytes and not without.fixed
    key = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    models = [install(BACKBONE.build(), merged) for merged in (with_it, without)]
    layers = [model.blocks[1].module.mlp.c_fc for model in models]
    shapes = [{name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} for layer in layers]
    assert shapes[0] == shapes[1] and sum(shape == (64, 16) for shape in shapes[0].values()) == 1
    x, w = drawn(2, 5, 16, seed=4), drawn(2, TASKS, seed=3)
    for layer in layers:
        layer.holder.w = w
    assert close(layers[0](x), layers[1](x) + x @ with_it.fixed[key].T, 1e-5)
    assert close(with_it.scaled(0.0).static(key), base[key] + with_it.fixed[key], 0)


@pytest.mark.parametrize("value", [0.2, 0.5, 0.9])
def test_isolated_svd_stores_no_more_and_as_much_as_fits(models, value):
    shapes = {
        "transformer.resblocks.0.mlp.c_fc.weight": (96, 24),
        "transformer.resblocks.0.mlp.c_proj.weight": (24, 96),
    }
    base, experts = family(TASKS, shapes)
    shared, apart = (
        merged_of(Duet(ranks=Ranks("fraction", value), factors=kind, static=False), base, experts)
        for kind in ("tucker", "svd")
    )
    for key, (m, n) in shapes.items():
        rank, size = round(value * 24), shared.deltas[key].params
        assert size == TASKS * rank**2 + TASKS**2 + (m + n) * rank
        delta, most = apart.deltas[key], min(m, n, size // (TASKS * (m + n + 1)))
        assert isinstance(delta, LowRank) and delta.rank == most and delta.params == TASKS * most * (m + n) <= size
        for task, tau in enumerate(task_vectors(base, experts)[key]):
            u, s, vh = torch.linalg.svd(tau)
            best = u[:, :most] * s[:most] @ vh[:most]
            assert close(delta.mix(apart.one_hot(task)), best, 1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_one_task_is_a_truncated_svd(rank):
    base, experts = family(1, SHAPES)
    merged = merged_of(Duet(ranks=Ranks("absolute", rank), static=False), base, experts)
    for key in MATRICES:
        u, s, vh = torch.linalg.svd(task_vectors(base, experts)[key][0], full_matrices=False)
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        assert close(merged.deltas[key].mix(torch.ones(1)), best, 1e-5)
        assert merged.energy[key] == pytest.approx([float(s[:rank].square().sum() / s.square().sum())], abs=1e-6)


def test_identical_tasks_need_one_task_rank_and_no_router():
    base, (expert,) = family(1, SHAPES)
    method = Duet(ranks=Ranks("absolute", 3, task=1), static=False)
    merged, alone = merged_of(method, base, [expert] * TASKS), merged_of(method, base, [expert])
    for key in MATRICES:
        single = alone.deltas[key].mix(torch.ones(1))
        for w in (W, torch.tensor([1.0, 0.0, 0.0]), torch.tensor([-3.0, 2.0, 2.0])):
            assert close(merged.deltas[key].mix(w), w.sum() * single, 1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_t_times_the_rank_is_nearly_as_good_as_isolated_svd(models, rank):
    """Each of the two unfoldings then loses no more than all the SVDs of that rank together."""
    base, experts = models
    for key in MATRICES:
        tau = task_vectors(base, experts)[key]
        limits = [min(m, TASKS * n, TASKS * rank) for m, n in (SHAPES[key], SHAPES[key][::-1])]
        ranks = Ranks("absolute", limits[0], in_value=limits[1])
        one = [{key: state[key]} for state in (base, *experts)]
        merged = merged_of(Duet(ranks=ranks, static=False), one[0], one[1:])
        isolated = torch.linalg.svdvals(tau)[:, rank:].square().sum()
        assert (tau - approximations(merged, key)).square().sum() <= 2 * isolated * (1 + 1e-5)
