"""Methods made for LoRA experts, of factors and of whole matrices, against their published steps and by algebra."""

import published_matrix as published
import pytest
import torch
from samples import drawn, family, models, task_vectors

from merging import Experts, UserError, merge
from merging.checkpoints import StateDict
from merging.checkpoints.lora import Lora, LoraConfig
from merging.combined import mix_of
from merging.methods import AsAdapter, Average, Cat, Dare, DoMerging, Emr, Knots, RegMean, TaskArithmetic, Ties
from merging.saving_adapter import check_adapters

SHAPES = {"a.weight": (8, 20), "b.weight": (24, 9), "c.bias": (7,)}
RANKS, FACTORS = (1, 2, 3), 1e-5


def adapted():
    """Experts as adapters of ranks 1, 2, 3 on a base of zeros, and the same as whole checkpoints."""
    base = StateDict({key: torch.zeros(shape) for key, shape in SHAPES.items()})
    adapters = []
    for rank in RANKS:
        tensors = {}
        for index, (name, (m, n)) in enumerate((key.removesuffix(".weight"), SHAPES[key]) for key in list(SHAPES)[:2]):
            tensors[f"base_model.model.{name}.lora_A.weight"] = drawn(rank, n, seed=10 * rank + index)
            tensors[f"base_model.model.{name}.lora_B.weight"] = drawn(m, rank, seed=10 * rank + index + 5)
        adapters.append(Lora(base, StateDict(tensors), LoraConfig(rank, 2 * rank, use_rslora=rank == 2)))
    whole = [StateDict({key: expert.tensor(key) for key in SHAPES}) for expert in adapters]
    return Experts.open(base, adapters), Experts.open(base, whole)


@pytest.mark.parametrize("density", [0.2, 0.6])
@pytest.mark.parametrize("tasks", [1, 3])
def test_knots_equals_the_published_steps(tasks, density):
    base, experts = family(tasks, SHAPES)
    (model,), taus = models(merge(Knots(Ties(density, "mean", 0.6)), base, experts)), task_vectors(base, experts)
    change = published.knots_ties({key: tau for key, tau in taus.items() if tau.ndim == 3}, density, 0.6)
    for key, weight in model.items():
        expected = base[key] + change.get(key, torch.zeros_like(base[key]))
        assert torch.allclose(weight.double(), expected.double(), rtol=0, atol=FACTORS), key


@pytest.mark.parametrize("method", [Knots(), Knots(TaskArithmetic()), DoMerging(steps=0)], ids=str)
def test_factors_and_whole_matrices_give_the_same(method):
    factored, whole = (method(experts) for experts in adapted())
    for key in SHAPES:
        assert torch.allclose(factored.weight(key), whole.weight(key), atol=FACTORS), key
    ranks = [mix.low_rank.rank for key in factored.shared if (mix := mix_of(factored.shared, key))]
    assert len(ranks) == 2 and max(ranks) <= sum(RANKS)


def test_knots_of_sums_is_a_sum():
    """U Z_t = tau_t: also where alpha and ranks differ."""
    for experts in adapted():
        merged, plain = Knots(TaskArithmetic(0.3))(experts), TaskArithmetic(0.3)(experts)
        assert all(torch.allclose(merged.weight(key), plain.weight(key), atol=FACTORS) for key in SHAPES)
        assert torch.allclose(merged.scaled(0.8).weight("a.weight"), plain.scaled(0.8).weight("a.weight"), atol=FACTORS)


def test_knots_takes_a_sparsifier_on_either_side_and_no_dynamic_method():
    experts, _ = adapted()
    inside = Knots(Dare(0.5, then=TaskArithmetic(1.0)))(experts).weight("a.weight")
    outside = Dare(0.5, then=Knots(TaskArithmetic(1.0)))(experts).weight("a.weight")
    assert inside.abs().max() > 0.1 and outside.abs().max() > 0.1 and not torch.allclose(inside, outside)
    with pytest.raises(UserError, match="knots: then must be a static method"):
        Knots(Emr())(experts)


@pytest.mark.parametrize("steps", [0, 1, 30])
def test_do_merging_equals_its_described_steps(steps):
    experts, _ = adapted()
    merged = DoMerging(penalty=0.5, steps=steps, lr=0.03)(experts)
    for key in ("a.weight", "b.weight"):
        low_rank = experts.low_rank(key)
        assert low_rank is not None
        factors = [tuple(factor.double() for factor in low_rank.factors(task)) for task in range(3)]
        expected = published.do_merging(factors, 0.5, steps, 0.03)
        assert torch.allclose(merged.weight(key).double(), expected, rtol=0, atol=FACTORS), key


def test_do_merging_makes_factors_of_different_tasks_nearly_orthogonal():
    rows = drawn(6, 10)
    off = lambda moved: float((moved @ moved.T)[:2, 2:].norm())  # noqa: E731
    assert off(DoMerging(penalty=0.0, steps=300, lr=0.05).orthogonal(rows, (2, 4))) < 0.2 * off(rows)
    assert torch.equal(DoMerging().orthogonal(rows, (6,)), rows)  # one task is orthogonal to no other


def test_do_merging_by_algebra():
    tau, rotation = drawn(3, 6, 8), torch.linalg.qr(drawn(6, 6, seed=3).double())[0].float()
    lengths = drawn(8, seed=4).abs() + 0.5

    def merged(taus):
        return merge(DoMerging(), {"w": torch.zeros(6, 8)}, [{"w": t} for t in taus]).weight("w")

    assert torch.allclose(merged(tau[:1]), tau[0], atol=FACTORS)
    assert torch.allclose(merged(rotation @ tau * lengths), rotation @ merged(tau) * lengths, atol=FACTORS)
    equal = tau / tau.norm(dim=1, keepdim=True)
    assert torch.allclose(merged(equal), equal.mean(0), atol=FACTORS)
    (remark,) = merge(DoMerging(), {"w": torch.zeros(6, 8)}, [{"w": t} for t in tau]).remarks
    assert "was left out" in remark and DoMerging()(adapted()[0]).remarks == ()


def test_cat_is_the_weighted_sum_of_the_products():
    weights = [0.5, -0.2, 0.9]
    factored, whole = (Cat(weights=weights, scale=2.0)(experts) for experts in adapted())
    factors = adapted()[0].low_rank("a.weight")
    assert factors is not None
    expected = 2 * sum((w * up @ down for w, (up, down) in zip(weights, map(factors.factors, range(3)), strict=True)))
    for merged in (factored, whole):
        assert torch.allclose(merged.weight("a.weight"), torch.as_tensor(expected), atol=FACTORS)
    for experts in adapted():
        assert torch.allclose(Cat()(experts).weight("b.weight"), Average()(experts).weight("b.weight"), atol=FACTORS)
    with pytest.raises(UserError, match=r"there are 2 weights for 3 tasks\. Give one per task"):
        Cat(weights=[1.0, 1.0])(adapted()[0])


def test_linear_sums_factors_and_needs_equal_ranks():
    base = StateDict({"a.weight": torch.zeros(5, 6)})
    pairs = [(drawn(5, 2, seed=t), drawn(2, 6, seed=t + 5)) for t in range(3)]
    names = ["base_model.model.a.lora_B.weight", "base_model.model.a.lora_A.weight"]
    tensors = [dict(zip(names, pair, strict=True)) for pair in pairs]
    lora = [Lora(base, StateDict(tensors[t]), LoraConfig(2, 2 * (t + 1))) for t in range(3)]  # alpha / r = 1, 2, 3
    merged = Cat("linear", [0.2, 0.3, 0.5])(Experts.open(base, lora))
    up = 0.2 * pairs[0][0] + 0.3 * 2 * pairs[1][0] + 0.5 * 3 * pairs[2][0]
    expected = up @ (pairs[0][1] + pairs[1][1] + pairs[2][1])
    assert torch.allclose(merged.weight("a.weight"), expected, atol=FACTORS)
    assert torch.allclose(Cat("linear")(Experts.open(base, lora[:1])).weight("a.weight"), lora[0].tensor("a.weight"))
    factored, whole = adapted()
    with pytest.raises(UserError, match=r"mode=linear needs equal ranks, and a.weight has \[1, 2, 3\]"):
        Cat("linear")(factored)
    with pytest.raises(UserError, match=r"a.weight of these experts has none: they are no adapters"):
        Cat("linear")(whole)


def test_they_make_adapters_where_whole_matrices_are_refused():
    experts, whole = adapted()
    for method in (Cat(), Knots(), DoMerging(), AsAdapter(Ties())):
        check_adapters(experts.checkpoints, experts.tasks, method)
        with pytest.raises(UserError, match="is a whole model"):
            check_adapters(whole.checkpoints, whole.tasks, method)
    with pytest.raises(UserError, match="Ties makes whole matrices"):
        check_adapters(experts.checkpoints, experts.tasks, Ties())


@pytest.mark.parametrize("then", [TaskArithmetic(0.7), Ties(0.5), Knots()], ids=str)
@pytest.mark.parametrize("rank", [1, 4, None])
def test_as_adapter_is_the_nearest_of_its_rank(then, rank):
    for experts in adapted():
        merged, plain = AsAdapter(then, rank)(experts), then(experts)
        for key in SHAPES:
            expected = plain.weight(key)
            if expected.ndim == 2:
                u, s, vh = torch.linalg.svd(expected, full_matrices=False)
                kept = rank or (max(RANKS) if experts.low_rank(key) is not None else len(s))
                expected = (u[:, :kept] * s[:kept]) @ vh[:kept]
            assert torch.allclose(merged.weight(key), expected, atol=FACTORS), key


def test_as_adapter_keeps_its_rank_where_adapters_are_as_wide_as_the_matrix():
    base = StateDict({"a.weight": torch.zeros(4, 100)})
    factors = ({"a.lora_A.weight": drawn(8, 100, seed=t), "a.lora_B.weight": drawn(4, 8, seed=t + 9)} for t in (1, 2))
    named = ({f"base_model.model.{name}": tensor for name, tensor in each.items()} for each in factors)
    experts = Experts.open(base, [Lora(base, StateDict(each), LoraConfig(8, 8)) for each in named])
    ranks = [torch.linalg.matrix_rank(AsAdapter(rank=rank)(experts).weight("a.weight")) for rank in (1, 2, None)]
    assert ranks == [1, 2, 4]


def test_what_runs_inputs_through_a_model_cannot_merge_coordinates():
    with pytest.raises(UserError, match="knots: then=RegMean looks at data"):
        Knots(then=RegMean())(adapted()[0])
