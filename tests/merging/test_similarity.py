"""Cosines between task vectors, against all of them flattened at once in NumPy."""

import itertools

import numpy as np
import pytest
import torch

from merging import similarity
from merging.cache import Cache
from merging.errors import UserError
from merging.experts import Experts

SHAPES = {"mlp.weight": (7, 5), "proj": (3, 4), "bias": (1,), "conv": (2, 3, 2, 2), "scale": ()}
TASKS = ("cars", "signs", "digits", "street")


def states(seed=0, tasks=TASKS, size=1.0):
    """A base, and an expert a task: partly a common change, partly its own."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}  # noqa: E731
    base, common = draw(), draw()
    experts = [{key: base[key] + size * (common[key] + tau) for key, tau in draw().items()} for _ in tasks]
    return {**base, "steps": torch.tensor(3)}, [{**expert, "steps": torch.tensor(3)} for expert in experts]


def dense(base, experts):
    """NumPy, all parameters in one long vector, in long double."""
    flat = [np.concatenate([(expert[key] - base[key]).numpy().ravel() for key in SHAPES]) for expert in experts]
    matrix = np.array(flat, dtype=np.longdouble)
    lengths = np.sqrt((matrix * matrix).sum(1))
    return (matrix @ matrix.T / np.outer(lengths, lengths)).astype(float)


@pytest.mark.parametrize("chunk", [1, 5, similarity.CHUNK])
def test_it_is_the_cosine_of_everything_that_changed(monkeypatch, chunk):
    monkeypatch.setattr(similarity, "CHUNK", chunk)
    base, experts = states()
    found = similarity.cosines(Experts.open(base, experts, TASKS)).numpy()

    assert found.dtype == np.float64 and found == pytest.approx(dense(base, experts), abs=1e-14)
    assert 0.2 < found[0, 1] < 0.8 and (found == found.T).all() and (found.diagonal() == 1).all()


def test_opposite_and_equal_experts():
    base, (one, *_) = states()
    away = {key: 2 * base[key] - one[key] for key in SHAPES}
    experts = Experts.open({key: base[key] for key in SHAPES}, [{key: one[key] for key in SHAPES}] * 2 + [away])
    assert similarity.cosines(experts).numpy() == pytest.approx(
        np.array([[1, 1, -1], [1, 1, -1], [-1, -1, 1]]), abs=1e-6)  # fmt: skip


def test_a_long_vector_of_small_numbers_is_summed_in_double_precision():
    """In single precision the sum of a million products keeps four digits or so."""
    generator = torch.Generator().manual_seed(0)
    base = {"wide": torch.zeros(1 << 20)}
    experts = [{"wide": 1e-4 * torch.randn(1 << 20, generator=generator) + 1e-3} for _ in range(2)]
    wide = [expert["wide"].numpy().astype(np.longdouble) for expert in experts]
    expected = float((wide[0] * wide[1]).sum() / np.sqrt((wide[0] ** 2).sum() * (wide[1] ** 2).sum()))
    assert similarity.cosines(Experts.open(base, experts))[0, 1].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kept", [True, False])
def test_the_order_of_the_tasks_only_orders_the_table(tmp_path, kept):
    base, experts = states()
    cache = Cache(tmp_path) if kept else None
    plain = similarity.cosines(Experts.open(base, experts, TASKS))
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        turned = Experts.open(base, [experts[task] for task in order], [TASKS[task] for task in order], cache)
        assert similarity.cosines(turned).numpy() == pytest.approx(
            plain[list(order)][:, list(order)].numpy(), abs=1e-14
        )


def test_an_expert_that_is_the_base_points_nowhere():
    base, experts = states()
    found = similarity.cosines(Experts.open(base, [experts[0], base, base, experts[1]]))
    assert found.isfinite().all() and (found[1:3] == 0).all() and (found[:, 1:3] == 0).all()
    assert found[0, 3] == pytest.approx(dense(base, experts)[0, 1])
    assert (similarity.cosines(Experts.open(base, [base])) == 0).all()


def test_tiny_and_huge_changes_have_the_same_cosines():
    for size in (1e-3, 1e12):
        base, experts = states(size=size)
        assert similarity.cosines(Experts.open(base, experts)).numpy() == pytest.approx(dense(base, experts), abs=1e-12)


def test_it_is_computed_once_per_set_of_experts(tmp_path, monkeypatch):
    base, experts = states()
    cache, made = Cache(tmp_path), []
    products = similarity._products
    monkeypatch.setattr(similarity, "_products", lambda some: made.append(some.tasks) or products(some))
    opened = Experts.open(base, experts, TASKS, cache)
    first = similarity.cosines(opened)

    assert (similarity.cosines(Experts.open(base, experts, TASKS, Cache(tmp_path))) == first).all()
    turned = similarity.cosines(Experts.open(base, experts[::-1], TASKS[::-1], cache))
    assert (turned == first.flip(0, 1)).all() and len(made) == 1
    part = similarity.cosines(opened.part(["proj"]))
    assert len(made) == 2 and not torch.equal(part, first)
    similarity.cosines(Experts.open(base, states(1)[1], TASKS, cache))
    assert len(made) == 3


def test_one_parameter_is_read_at_a_time_and_no_number_is_hidden():
    base, experts = states()
    opened, seen = Experts.open(base, experts, TASKS), []
    released = []
    for checkpoint in opened.checkpoints:
        tensor = checkpoint.tensor
        object.__setattr__(checkpoint, "tensor", lambda key, tensor=tensor: seen.append(key) or tensor(key))
        object.__setattr__(checkpoint, "release", lambda: released.append(len(seen)))
    similarity.cosines(opened)
    assert [len(set(seen[start : start + 4])) for start in range(0, len(seen), 4)] == [1] * len(SHAPES)
    assert len(seen) == 4 * len(SHAPES) and set(released) >= {4 * (number + 1) for number in range(len(SHAPES))}

    damaged = {**experts[1], "proj": torch.full((3, 4), torch.nan)}
    with pytest.raises(UserError, match=r"proj is not finite .*expert for signs"):
        similarity.cosines(Experts.open(base, [experts[0], damaged, *experts[2:]], TASKS))
