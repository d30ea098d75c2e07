"""Experts: what is refused before a weight is read, what is in memory at a time, what is decomposed once."""

import threading
import weakref

import pytest
import torch
from samples import SHAPES, drawn, equal, family, models, task_vectors

from merging import Experts, UserError, merge
from merging.checkpoints import StateDict
from merging.decompose import svd as factors
from merging.decompose.tucker import full_ranks
from merging.methods import Average, Expert, IsoC, IsoCts, TaskArithmetic, Ties, TsvM


class HeaderOnly(StateDict):
    """A checkpoint whose weights must not be read."""

    def tensor(self, key):
        raise AssertionError(f"{key} was read")


class Counting(StateDict):
    """A checkpoint that reads like a file: every call makes a new tensor. Counts how many of all are alive."""

    alive, most = set(), 0

    def tensor(self, key):
        tensor = super().tensor(key).clone()
        Counting.alive.add(token := object())
        Counting.most = max(Counting.most, len(Counting.alive))
        weakref.finalize(tensor, Counting.alive.discard, token)
        return tensor


def opened(*arguments, **options):
    return Experts.open(*family(3), *arguments, **options)


def test_keys_come_in_one_order_and_by_kind():
    shapes = {
        "transformer.resblocks.1.mlp.c_fc.weight": (3, 2),
        "transformer.resblocks.0.ln_1.bias": (2,),
        "transformer.resblocks.0.attn.out_proj.weight": (2, 2),
        "conv1.weight": (1,),
    }
    experts = Experts.open(*family(1, shapes))
    assert experts.keys() == tuple(sorted(shapes)) == Experts.open(*family(1, dict(reversed(shapes.items())))).keys()
    assert experts.keys("ffn") == ("transformer.resblocks.1.mlp.c_fc.weight",) and experts.keys("norm") == (
        "transformer.resblocks.0.ln_1.bias",
    )
    assert experts.keys("attention") == ("transformer.resblocks.0.attn.out_proj.weight",) and experts.keys(
        "embedding"
    ) == ("conv1.weight",)


def test_task_vectors_are_differences_in_fp32():
    base, experts = family(3, dtype=torch.bfloat16)
    opened, expected = Experts.open(base, experts), task_vectors(base, experts)
    assert opened.specs()["cube"].dtype == torch.bfloat16 and opened.base("cube").dtype == torch.float32
    assert all(torch.equal(opened.tau(key).double(), expected[key]) for key in opened.specs())
    mixed = Experts.open(base, [family(1)[1][0]])
    assert mixed.specs()["cube"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cube": None}, "expert for b .* lacks cube, which the base"),
        (
            {"cube": None, "norm.bias": None, "one.bias": None, "logit_scale": None},
            "lacks cube, logit_scale, norm.bias and 1 more",
        ),
        ({"head.weight": (2, 2)}, "expert for b .* has head.weight, which the base .* lacks"),
        ({"cube": (3, 5, 4)}, r"expert for b .* has cube of shape \(3, 5, 4\), the base .* has \(3, 4, 5\)"),
        ({"logit_scale": (1,)}, r"has logit_scale of shape \(1,\), the base .* has \(\)"),
    ],
)
def test_keys_and_shapes_are_checked_from_headers(change, message):
    base, experts = family(3)
    shapes = {**SHAPES, **change}
    wrong = {key: drawn(*shape) for key, shape in shapes.items() if shape is not None} | {
        "position_ids": torch.arange(4)
    }
    states = [HeaderOnly(state, f"file {index}") for index, state in enumerate((base, experts[0], wrong, experts[2]))]
    with pytest.raises(UserError, match=message) as error:
        merge(Average(), states[0], states[1:], ["a", "b", "c"])
    assert "file 2" in str(error.value) and "file 0" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tasks", "count", "message"),
    [
        ([], 0, "the list of tasks is empty"),
        (None, 0, "the list of tasks is empty"),
        (["a", "b", "a"], 3, r"The task a is listed more than once in \[a, b, a\]"),
        (["a", "b"], 3, r"There are 3 experts for 2 tasks \(a, b\)"),
        (["a", "b", "c"], 1, "There are 1 experts for 3 tasks"),
    ],
)
def test_tasks_are_checked_from_headers(tasks, count, message):
    base, experts = family(count)
    with pytest.raises(UserError, match=message):
        Experts.open(HeaderOnly(base), [HeaderOnly(expert) for expert in experts], tasks)


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", [Average(), Ties(), TsvM(), IsoC(), IsoCts(), Expert()])
def test_a_number_that_is_not_finite_names_parameter_and_expert(method, worst):
    base, experts = family(3)
    experts[1]["wide.weight"][4, 7] = worst
    with pytest.raises(UserError, match=r"wide.weight is not finite \(NaN or Inf\) in the expert for b"):
        models(merge(method, base, experts, ["a", "b", "c"]))


def test_finite_numbers_whose_sum_overflows_are_fine():
    huge = torch.full((4,), 3e38)
    assert torch.equal(merge(Average(), {"w": torch.zeros(4)}, [{"w": huge}]).weight("w"), huge)


def test_a_thread_has_one_parameter_of_all_experts_in_memory():
    base, experts = family(8)
    counted = Experts.open(Counting(base), [Counting(expert) for expert in experts])
    Counting.most = 0
    for method in (Average(), TaskArithmetic(), Ties(), Expert()):
        method(counted)
    assert 0 < Counting.most <= torch.get_num_threads() * (1 + 8) and not Counting.alive
    taus = [tau for _, tau in counted.stream()]
    assert len({tau.untyped_storage().data_ptr() for tau in taus}) == 1
    assert taus[0].untyped_storage().nbytes() == 4 * 8 * max(torch.Size(shape).numel() for shape in SHAPES.values())


def test_map_keeps_nothing_of_the_buffer():
    """What a function returns is its own, even if it is a view of the task vectors it was given."""
    experts = opened()
    views = experts.map(lambda key, tau: tau[1])
    assert all(torch.equal(value, experts.tau(key)[1]) for key, value in views.items())
    assert tuple(experts.map(lambda key, tau: tau[0], ["cube", "norm.bias"])) == ("cube", "norm.bias")
    assert experts.map(lambda key, tau: tau[0], []) == {}


def test_heavy_map_is_the_same_map_in_threads(two_threads):
    experts, names = opened(), set()

    def work(key, tau):
        names.add(threading.current_thread().name)
        return tau.sum(0)

    heavy = experts.map(work, heavy=True)
    assert torch.get_num_threads() == 2
    assert threading.current_thread().name not in names
    assert equal(heavy, experts.map(work)) and tuple(heavy) == experts.keys()
    with pytest.raises(ZeroDivisionError):
        experts.map(lambda key, tau: 1 / 0, heavy=True)


@pytest.fixture
def decompositions(monkeypatch):
    """The shapes of the matrices decomposed so far; a wide one is decomposed as the tall one that it is turned into."""
    shapes, plain = [], factors.svd

    def counting(matrix, rank=None):
        if matrix.shape[0] >= matrix.shape[1] and rank != 0:
            shapes.append(tuple(matrix.shape))
        return plain(matrix, rank)

    monkeypatch.setattr(factors, "svd", counting)
    return shapes


@pytest.mark.parametrize(("method", "count"), [(TsvM(), 3 * 3), (IsoC(), 3)])
def test_factors_are_cached_by_content(cache, decompositions, method, count):
    base, experts = family(3)
    first = merge(method, base, experts, cache=cache)
    assert len(decompositions) == count
    again = merge(method, base, [dict(expert) for expert in experts], cache=cache)
    assert len(decompositions) == count and equal(*models(first), *models(again))
    assert equal(*models(first), *models(merge(method, base, experts)))
    decompositions.clear()
    changed = experts[2] | {"wide.weight": experts[2]["wide.weight"] + 1, "norm.bias": experts[2]["norm.bias"] + 1}
    merge(method, base, [*experts[:2], changed], cache=cache)
    assert decompositions == [SHAPES["wide.weight"][::-1]]  # of one task, or of the sum: a wide matrix, turned
    decompositions.clear()
    equal(*models(merge(method, base, experts[:2], cache=cache)), *models(merge(method, base, experts[:2])))


def test_iso_methods_share_the_decomposition_of_the_sum(cache, decompositions):
    base, experts = family(3)
    merge(IsoC(), base, experts, cache=cache)
    decompositions.clear()
    merge(IsoC(scale=2.0), base, experts, cache=cache), merge(IsoCts(1.0), base, experts, cache=cache)
    assert not decompositions


def test_sparsified_experts_have_factors_of_their_own(cache):
    base, experts = family(2)
    plain, double = Experts.open(base, experts, cache=cache), lambda key, task, tau: tau * 2
    before = models(IsoC()(plain))
    twice = plain.sparsified(double).sparsified(lambda key, task, tau: tau + 1)
    assert all(torch.equal(twice.tau(key), plain.tau(key) * 2 + 1) for key in plain.specs())
    uncached = Experts.open(base, experts).sparsified(double)
    assert all(map(equal, models(IsoC()(plain.sparsified(double))), models(IsoC()(uncached))))
    assert all(map(equal, models(IsoC()(plain)), before))


def test_a_smaller_rank_is_cut_from_the_cached_factors(cache, decompositions):
    base, states = family(3)
    experts = Experts.open(base, states, cache=cache)
    key = next(key for key, spec in experts.specs().items() if len(spec.shape) == 2 and min(spec.shape) >= 4)
    tau = experts.tau(key)
    full, count = experts.svd(tau, 3), len(decompositions)
    for larger, smaller in zip(full, experts.svd(tau, 2), strict=True):
        assert torch.equal(larger.u[:, :2], smaller.u) and torch.equal(larger.vh[:2], smaller.vh)
    assert len(decompositions) == count > 0
    assert experts.svd(tau, 4)[0].s.shape == (4,)
    assert len(decompositions) == 2 * count


def test_factors_are_those_of_the_matrices_that_are_given(cache):
    """Of task vectors, residuals, sums, a part or a transpose: none is answered with the factors of another one."""
    base, states = family(3)
    experts = Experts.open(base, states, cache=cache)
    tau = experts.tau("wide.weight")
    asked = {
        "tau": tau,
        "residual": tau - tau.mean(0),
        "part": tau[:2],
        "sum": tau.sum(0, keepdim=True),
        "third": tau[:, :4],
    }
    for _ in range(2):
        for stack in (*asked.values(), tau.mT):
            for matrix, (u, s, vh) in zip(stack, experts.svd(stack), strict=True):
                assert torch.allclose(u * s @ vh, matrix, atol=1e-5)
            assert torch.allclose(experts.tucker(stack, full_ranks(stack.shape)).dense(), stack, atol=1e-5)


def test_an_interrupted_merge_goes_on_from_its_cached_factors(cache, decompositions, monkeypatch):
    base, experts = family(3)
    expected, total, counting = merge(TsvM(), base, experts), len(decompositions), factors.svd
    decompositions.clear()

    def interrupted(matrix, rank=None):
        if len(decompositions) >= 5:  # two workers: at least one of the parameters, three matrices each, is done
            raise KeyboardInterrupt
        return counting(matrix, rank)

    with monkeypatch.context() as patch:
        patch.setattr(factors, "svd", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(TsvM(), base, experts, cache=cache)
    done = len(decompositions)
    assert equal(*models(expected), *models(merge(TsvM(), base, experts, cache=cache)))
    assert len(decompositions) - done <= total - 3
