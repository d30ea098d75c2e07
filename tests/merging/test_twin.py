"""Twin-Merging against its published steps, its ablations, and the traps of the authors' code."""

import pytest
import torch
from ffns import ATOL, TASKS, W, close, small_towers
from samples import BACKBONE, drawn, equal, family, merged_of, task_vectors

from merging import UserError
from merging.deltas import Dense, LowRank, Rows
from merging.methods import Average, Base, Expert, Single, TaskArithmetic, Ties, Twin
from merging.routing.install import install

SHAPES = {
    "conv1.weight": (10, 3, 2, 2),
    "class_embedding": (10,),
    "transformer.resblocks.0.attn.in_proj_weight": (30, 10),
    "transformer.resblocks.0.attn.in_proj_bias": (30,),
    "transformer.resblocks.0.mlp.c_fc.weight": (24, 10),
    "transformer.resblocks.1.ln_1.weight": (10,),
    "transformer.resblocks.1.mlp.c_proj.weight": (10, 24),
    "proj": (10, 6),
}
SHARED = [TaskArithmetic(0.3), Average(), Ties(), Base(), Single("task1")]
with_shared = pytest.mark.parametrize("shared", SHARED, ids=lambda shared: type(shared).__name__)


@pytest.fixture(scope="module")
def models():
    return family(TASKS, SHAPES)


def best(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def published(beyond, key, rank):
    """Truncated exclusive vectors [T, *shape] in fp64: query, key and value apart, vectors whole."""
    if beyond.ndim == 2:
        return beyond
    pieces = 3 if "in_proj" in key else 1
    flat = [torch.cat([best(part, rank) for part in one.flatten(1).chunk(pieces)]) for one in beyond]
    return torch.stack(flat).view_as(beyond)


@with_shared
@pytest.mark.parametrize("rank", [1, 3])
def test_equals_the_published_steps(models, shared, rank):
    base, experts = models
    merged = merged_of(Twin(shared, rank=rank, start=None), base, experts)
    alone = merged_of(shared, base, experts)
    for key in SHAPES:
        common = alone.weight(key).double()
        beyond = torch.stack([expert[key].double() - common for expert in experts])
        vectors = published(beyond, key, rank)
        expected = common + torch.einsum("t,t...->...", W.double(), vectors)
        assert close(merged.weight(key, W), expected, 1e-5), key
        lost = (beyond - vectors).flatten(1).square().sum(1) / beyond.flatten(1).square().sum(1).clamp_min(1e-30)
        assert merged.energy[key] == pytest.approx((1 - lost).tolist(), abs=1e-5), key


@with_shared
def test_everything_kept_gives_every_expert(models, shared):
    base, experts = models
    for method in (Twin(shared, keep=1.0, start=None), Twin(shared, keep=1.0, measure="energy", start=None)):
        merged = merged_of(method, base, experts)
        for key in SHAPES:
            for task, expert in enumerate(experts):
                assert close(merged.weight(key, merged.one_hot(task)), expert[key]), key


@with_shared
@pytest.mark.parametrize("nothing", [{"rank": 0}, {"keep": 0.0}, {"keep": 0.0, "measure": "energy"}])
def test_nothing_kept_gives_the_shared_matrices(models, shared, nothing):
    base, experts = models
    merged, alone = merged_of(Twin(shared, **nothing, start=None), base, experts), merged_of(shared, base, experts)
    for key, shape in SHAPES.items():
        if len(shape) > 1:
            assert close(merged.weight(key, W), alone.weight(key), 1e-6), key


def test_differences_to_the_mean_cancel(models):
    base, experts = models
    merged, mean = merged_of(Twin(Average(), keep=1.0, start=None), base, experts), merged_of(Average(), base, experts)
    for key in SHAPES:
        assert close(merged.weight(key, torch.full((TASKS,), 1 / TASKS)), mean.weight(key)), key


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_error_of_a_matrix_is_the_tail_of_its_singular_values(models, rank):
    base, experts = models
    merged = merged_of(Twin(rank=rank, start=None), base, experts)
    taus = task_vectors(base, experts)
    for key in ("conv1.weight", "transformer.resblocks.0.mlp.c_fc.weight", "proj"):
        beyond = (taus[key] - 0.3 * taus[key].sum(0)).flatten(2)
        for task in range(TASKS):
            left = beyond[task] - merged.deltas[key].mix(merged.one_hot(task)).double().flatten(1)
            tail = torch.linalg.svdvals(beyond[task])[rank:].square().sum()
            assert float(left.square().sum()) == pytest.approx(float(tail), rel=1e-5)


def test_low_rank_experts_are_compressed_as_products():
    """On W_0 + B A the dense changes count: factors truncated and mixed apart give another model."""
    factors = [(drawn(12, 3, seed=t), drawn(3, 9, seed=t + 9)) for t in range(TASKS)]
    base = {"transformer.resblocks.0.mlp.c_fc.weight": drawn(12, 9, seed=50)}
    (key,) = base
    experts = [{key: base[key] + b @ a} for b, a in factors]
    merged = merged_of(Twin(Base(), rank=2), base, experts)
    products = [(b.double() @ a.double()) for b, a in factors]
    expected = sum(w * best(product, 2) for w, product in zip(W, products, strict=True))
    assert close(merged.deltas[key].mix(W), expected, 1e-4)
    apart = [[best(each.double(), 2) for each in pair] for pair in factors]
    mixed = [sum(w * pair[i] for w, pair in zip(W, apart, strict=True)) for i in (0, 1)]
    assert not close(merged.deltas[key].mix(W), mixed[0] @ mixed[1], 0.5)
    whole = merged_of(Twin(Base(), rank=3), base, experts)
    assert close(whole.deltas[key].mix(W), sum(w * product for w, product in zip(W, products, strict=True)), 1e-4)


def test_a_bias_of_one_expert_acts_through_its_weight_alone():
    """No bias, norm or head comes from the true task's expert."""
    base, experts = small_towers()
    key = "visual.transformer.resblocks.1.mlp.c_proj.bias"
    moved = [experts[0], {**experts[1], key: experts[1][key] + drawn(16)}, experts[2]]
    before, after = (install(BACKBONE.build(), merged_of(Twin(Base()), base, each)) for each in (experts, moved))
    images = drawn(4, 3, 16, 16, seed=2)
    for w in (torch.tensor([1.0, 0, 0]), torch.tensor([0.4, 0, 0.6])):
        assert torch.equal(before(images, w=w), after(images, w=w))
    some = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5], [0, 0, 1], [0, 1, 0]])
    moved_rows = (before(images, w=some) - after(images, w=some)).abs().amax(1) > 1e-4
    assert moved_rows.tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("full", "rank"), [(768, 77), (1280, 128), (1024, 102), (512, 51), (640, 64), (192, 19), (10, 1), (4, 1), (1, 1)]
)
def test_rank_is_the_rounded_share(full, rank):
    """Not int((1 - 0.9) * full) of the authors, which gives 76, 127 and 0 for 768, 1280 and 1."""
    base = {"transformer.resblocks.0.mlp.c_fc.weight": torch.zeros(full + 1, full)}
    delta = merged_of(Twin(), base, [base, base]).deltas["transformer.resblocks.0.mlp.c_fc.weight"]
    assert isinstance(delta, LowRank) and delta.rank == rank and delta.params == 2 * rank * (2 * full + 1)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_energy_chooses_the_smallest_rank_that_serves_every_task(models, share):
    base, experts = models
    merged = merged_of(Twin(Base(), keep=share, measure="energy", start=None), base, experts)
    for key in (
        "conv1.weight",
        "transformer.resblocks.0.mlp.c_fc.weight",
        "transformer.resblocks.1.mlp.c_proj.weight",
        "proj",
    ):
        values = torch.linalg.svdvals(task_vectors(base, experts)[key].flatten(2)).square()
        held = values.cumsum(1) / values.sum(1, keepdim=True)
        rank = merged.deltas[key].rank
        assert held[:, rank - 1].min() >= share and (rank == 1 or held[:, rank - 2].min() < share), key
        assert min(merged.energy[key]) >= share - 1e-6


def test_query_key_and_value_are_decomposed_apart(models):
    base, experts = models
    key = "transformer.resblocks.0.attn.in_proj_weight"
    apart, fused = (
        merged_of(Twin(Base(), rank=2, split_qkv=split), base, experts).deltas[key] for split in (True, False)
    )
    assert isinstance(apart, Rows) and isinstance(fused, LowRank)
    assert [delta.rank for delta in apart.blocks] == [2, 2, 2] and fused.rank == 2
    tau = task_vectors(base, experts)[key]
    assert close(fused.mix(torch.eye(TASKS)), torch.stack([best(one, 2) for one in tau]), 1e-5)
    assert not close(fused.mix(torch.eye(TASKS)), apart.mix(torch.eye(TASKS)), 0.1)


def test_what_lies_before_the_first_routed_block_is_shared(models):
    base, experts = models
    alone = merged_of(TaskArithmetic(), base, experts)
    stem = {"conv1.weight", "class_embedding"}
    for start, static in ((0, stem), (1, stem | {key for key in SHAPES if "transformer.resblocks.0" in key})):
        merged = merged_of(Twin(start=start), base, experts)
        assert set(merged.deltas) == set(SHAPES) - static
        assert all(close(merged.weight(key), alone.weight(key), 1e-6) for key in static)
    assert set(merged_of(Twin(start=None), base, experts).deltas) == set(SHAPES)


def test_a_tenth_of_the_values_is_a_fifth_of_the_numbers():
    """Of a 768 x 768 matrix; the singular values are folded into one factor."""
    base = {"transformer.resblocks.0.mlp.c_fc.weight": torch.zeros(768, 768)}
    assert merged_of(Twin(), base, [base]).deltas[
        "transformer.resblocks.0.mlp.c_fc.weight"
    ].params / 768**2 == pytest.approx(0.2, abs=0.002)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 1.0])
def test_magnitude_keeps_the_largest_entries(models, keep):
    base, experts = models
    merged = merged_of(Twin(Base(), keep=keep, sparsify="magnitude", start=None), base, experts)
    for key, tau in task_vectors(base, experts).items():
        own = merged.deltas[key].mix(torch.eye(TASKS)).double()
        if tau.ndim == 2:
            assert close(own, tau)
            continue
        for kept, whole in zip(own.flatten(1), tau.flatten(1), strict=True):
            chosen = whole.abs().argsort(descending=True, stable=True)[: round(keep * len(whole))]
            assert close(kept, torch.zeros_like(whole).index_copy(0, chosen, whole[chosen])), key


def test_dropout_keeps_random_entries_by_name_and_task(models):
    base, experts = models
    method, names = Twin(Base(), keep=0.25, sparsify="dropout", start=None), ["a", "b", "c"]
    merged, again = (merged_of(method, base, experts, names) for _ in range(2))
    turned = merged_of(method, base, experts[::-1], names[::-1])
    key = "transformer.resblocks.0.mlp.c_fc.weight"
    own, tau = merged.deltas[key].mix(torch.eye(TASKS)), task_vectors(base, experts)[key]
    kept = own != 0
    assert close(own, tau * kept * 4) and equal({"": own}, {"": again.deltas[key].mix(torch.eye(TASKS))})
    assert torch.equal(own, turned.deltas[key].mix(torch.eye(TASKS)).flip(0)) and not torch.equal(kept[0], kept[1])
    count, spread = 3 * 240, (3 * 240 * 0.25 * 0.75) ** 0.5
    assert abs(int(kept.sum()) - 0.25 * count) < 5 * spread
    for share in (0.0, 1.0):
        own = merged_of(Twin(Base(), keep=share, sparsify="dropout"), base, experts).deltas[key].mix(torch.eye(TASKS))
        assert close(own, share * tau)


def test_one_expert_for_all(models):
    base, experts = models
    for task, index in (("task2", 2), (1, 1), (None, 0)):
        assert all(close(merged_of(Single(task), base, experts).weight(key), experts[index][key]) for key in SHAPES)
    assert close(merged_of(Single(), base, experts, ["c", "a", "b"]).weight("proj"), experts[1]["proj"])
    for task in ("task9", 3, -1):
        with pytest.raises(UserError, match=f"task={task!r} is none of the tasks task0, task1, task2, and no position"):
            merged_of(Single(task), base, experts)


def test_around_a_task_expert_its_own_vector_is_empty(models):
    base, experts = models
    merged = merged_of(Twin(Single("task1"), start=None), base, experts)
    for key in SHAPES:
        assert close(merged.weight(key, torch.tensor([0.0, 1, 0])), experts[1][key])
        assert close(merged.deltas[key].mix(torch.tensor([0.0, 1, 0])), torch.zeros(SHAPES[key]))
        assert isinstance(merged.deltas[key], Dense) == (len(SHAPES[key]) == 1)


def test_the_fixed_part_of_the_shared_expert_is_kept(models):
    base, experts = models

    def shared(opened):
        ones = torch.ones(SHAPES["proj"])
        return opened.merged({"proj": 2 * ones}, 0.25, fixed={"proj": ones, "class_embedding": torch.ones(10)})

    merged = merged_of(Twin(shared, rank=0, start=0), base, experts)
    assert close(merged.weight("proj", W), base["proj"] + 1.5) and close(
        merged.weight("class_embedding"), base["class_embedding"] + 1
    )
    assert close(
        merged_of(Twin(shared, keep=1.0), base, experts).weight("proj", torch.eye(TASKS)[1]), experts[1]["proj"]
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Twin(keep=1.1), r"twin: keep=1.1 is out of range: it must lie in \[0.0, 1.0\]"),
        (lambda: Twin(rank=-1), "twin: rank=-1 is out of range"),
        (lambda: Twin(sparsify="topk"), "sparsify='topk' is unknown. Choose one of svd, magnitude, dropout"),
        (lambda: Twin(measure="norm"), "measure='norm' is unknown. Choose one of values, energy"),
        (lambda: Twin(rank=7, start=None), r"rank=7 is above the full rank of proj, 6 = min\(10, 6\)"),
        (lambda: Twin(Expert()), "shared must be a static method"),
    ],
)
def test_what_cannot_be_done_is_refused(models, build, message):
    with pytest.raises(UserError, match=message):
        merged_of(build(), *models)


def test_nothing_to_route_is_a_static_merge():
    base, experts = family(2, {"class_embedding": (4,), "logit_scale": ()})
    merged = merged_of(Twin(), base, experts)
    assert merged.routing is None and not merged.deltas
    assert close(
        merged.weight("class_embedding"), merged_of(TaskArithmetic(), base, experts).weight("class_embedding"), ATOL
    )
