"""What every merge method promises: all those in the files of merging/methods, with the defaults of their knobs."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from samples import (
    SHAPES,
    applied,
    asks,
    drawn,
    equal,
    every_method,
    family,
    merged_of,
    mixed,
    models,
    opened,
    plain,
    quantising,
    quick,
    suited,
    tower,
)

from merging import merge, open_merged
from merging.calibration import Calibration
from merging.methods import TaskArithmetic, discovered

MATRICES = {key: shape for key, shape in SHAPES.items() if len(shape) == 2}
METHODS = [pytest.param(quick(each), id=each.__name__) for each in every_method()]
QUANTISING = [pytest.param(quick(each), id=each.__name__) for each in quantising()]
every = pytest.mark.parametrize("method", METHODS)
rounding_too = pytest.mark.parametrize("method", METHODS + QUANTISING)
everywhere = pytest.mark.parametrize("shapes", [plain, tower])


def unmoved(tasks, shapes=plain, dtype=torch.float32):
    base, _ = family(0, shapes(), dtype)
    return base, [dict(base) for _ in range(tasks)]


def one_unmoved(shapes=plain):
    base, experts = family(3, shapes())
    return base, [experts[0], dict(base), experts[2]]


def twins(shapes=plain):
    base, experts = family(3, shapes())
    return base, [experts[0], experts[1], {key: tensor.clone() for key, tensor in experts[0].items()}]


def opposites(shapes=plain):
    base, experts = family(1, shapes())
    opposite = {key: 2 * tensor - experts[0][key] for key, tensor in base.items()}
    return base, [experts[0], opposite]


def low_rank():
    base, _ = family(0, MATRICES)
    low = [{key: drawn(m, 2, seed=t) @ drawn(2, n, seed=t + 9) for key, (m, n) in MATRICES.items()} for t in range(3)]
    return base, [base | {key: base[key] + tau for key, tau in each.items()} for each in low]


SITUATIONS = {
    "eight tasks": lambda: family(8),
    "one task": lambda: family(1),
    "more tasks than rows": lambda: family(5, {"w": (3, 4), "row": (1, 6), "column": (6, 1), "one": (1, 1)}),
    "a single number": lambda: family(2, {"one": (1,), "scale": ()}),
    "an empty parameter": lambda: family(2, {"none": (0,), "some": (3,)}),
    "all task vectors zero": lambda: unmoved(3),
    "one task vector zero": one_unmoved,
    "two equal experts": twins,
    "two opposite experts": opposites,
    "low rank": low_rank,
    "tiny changes": lambda: family(3, spread=1e-4),
    "bf16": lambda: family(3, dtype=torch.bfloat16),
    "fp16": lambda: family(3, dtype=torch.float16),
    "fp64": lambda: family(3, dtype=torch.float64),
    "tower, five tasks": lambda: family(5, tower()),
    "tower, one task": lambda: family(1, tower()),
    "tower, all task vectors zero": lambda: unmoved(3, tower),
    "tower, one task vector zero": lambda: one_unmoved(tower),
    "tower, two equal experts": lambda: twins(tower),
    "tower, two opposite experts": lambda: opposites(tower),
    "tower, bf16": lambda: family(3, tower(), torch.bfloat16),
    "tower, fp16": lambda: family(3, tower(), torch.float16),
    "tower, fp64": lambda: family(3, tower(), torch.float64),
}


@pytest.mark.parametrize(
    ("method", "situation"),
    [
        pytest.param(method, situation, id=f"{type(method).__name__}-{situation}")
        for (method,) in (each.values for each in METHODS + QUANTISING)
        for situation in SITUATIONS
        if situation.startswith("tower") or not asks(method)  # which refuses other names: test_naming.py
    ],
)
def test_is_whole_finite_repeatable_and_leaves_its_inputs_alone(method, situation):
    base, experts = SITUATIONS[situation]()
    before = [{key: tensor.clone() for key, tensor in state.items()} for state in (base, *experts)]
    merged = merged_of(method, base, experts)
    first, second = models(merged), models(merged_of(method, base, experts))
    assert len(first) == len(second) and all(map(equal, first, second))
    floating = {key: tensor.shape for key, tensor in base.items() if tensor.is_floating_point()}
    for model in first:
        assert {key: weight.shape for key, weight in model.items()} == floating
        assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in model.values())
    assert all(map(equal, before, (base, *experts)))
    assert merged.packed or merged.stored_bytes >= sum(tensor.nbytes for tensor in base.values())


@every
@everywhere
@pytest.mark.parametrize(
    ("dtype", "tasks"), [(torch.float32, 1), (torch.float32, 4), (torch.bfloat16, 4), (torch.float16, 4)]
)
def test_experts_equal_to_the_base_give_the_base(method, shapes, dtype, tasks):
    base, experts = unmoved(tasks, lambda: suited(method, shapes), dtype)
    for model in models(merged_of(method, base, experts)):
        assert equal(model, {key: base[key].float() for key in model})


@every
def test_does_not_depend_on_the_order_of_tasks(method, monkeypatch):
    """But for the batches of a task, which its place decides: here its samples do."""
    drawn = Calibration.drawn
    alone = lambda data, task: data.part({task: torch.arange(data.sizes[task])})  # noqa: E731
    by_samples = lambda data, task, *of_draw: drawn(alone(data, task), 0, *of_draw, data.ids[task])  # noqa: E731
    monkeypatch.setattr(Calibration, "drawn", by_samples)
    base, experts = family(4, suited(method))
    names, order = ["a", "b", "c", "d"], [2, 0, 3, 1]
    first = models(merged_of(method, base, experts, names))
    turned = models(merged_of(method, base, [experts[i] for i in order], [names[i] for i in order]))
    expected = [first[i] for i in order] if len(first) > 1 else first
    for model, reference in zip(turned, expected, strict=True):
        for key, weight in model.items():  # factors in fp32, added in another order: a few spacings of 2^-21 below 8
            assert torch.allclose(weight, reference[key], rtol=0, atol=5e-6), key


@rounding_too
def test_does_not_depend_on_the_order_of_parameters(method):
    base, experts = family(3, suited(method))
    turned = [dict(reversed(state.items())) for state in (base, *experts)]
    assert all(map(equal, models(merged_of(method, base, experts)), models(merged_of(method, turned[0], turned[1:]))))


@rounding_too
def test_does_not_depend_on_the_number_of_threads(method, two_threads):
    learns = hasattr(method, "train")  # backward passes sum a part per thread: to the last bits they differ
    if learns:
        method = replace(method, train=replace(method.train, lr=min(method.train.lr, 1e-3)))
    base, experts = family(3, suited(method) if asks(method) else {"large": (300, 700), **mixed()})
    parallel = models(merged_of(method, base, experts))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    for one, other in zip(parallel, models(merged_of(method, base, experts)), strict=True):
        assert equal(one, other) or learns
        assert all(torch.allclose(one[key], other[key], rtol=0, atol=5e-6) for key in one)


@rounding_too
def test_files_and_state_dicts_give_the_same(method, stored):
    base, experts = family(3, suited(method))
    paths = [stored(state) for state in (base, *experts)]
    assert all(map(equal, models(merged_of(method, base, experts)), models(merged_of(method, paths[0], paths[1:]))))


@every
@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saves_what_it_computes_with_buffers_copied(method, shapes, dtype, tmp_path):
    """A dense model in the dtype of the experts; with deltas, all that is needed for the same bits again."""
    base, experts = family(2, suited(method, shapes), dtype)
    merged = merged_of(method, base, experts)
    path = merged.save(tmp_path / "merged.safetensors")
    saved = load_file(path)
    assert torch.equal(saved.pop("position_ids"), base["position_ids"])
    if not merged.is_static:
        assert all(map(equal, models(open_merged(path)), models(merged)))
    else:
        assert equal(saved, {key: weight.to(dtype) for key, weight in models(merged)[0].items()})


@every
def test_sparsified_task_vectors_replace_the_original_ones(method):
    base, experts = family(3, suited(method))
    found = opened(base, experts)
    before = models(applied(method, found))
    for model in models(applied(method, found.sparsified(lambda key, task, tau: tau.zero_()))):
        assert equal(model, {key: base[key] for key in model})
    assert all(map(equal, models(applied(method, found)), before))


@rounding_too
def test_needs_what_it_says(method):
    """Experts without images are enough for a method that needs nothing."""
    if method.needs == "nothing":
        base, experts = family(2, tower())
        assert all(map(equal, models(merge(method, base, experts)), models(merged_of(method, base, experts))))


@dataclass(frozen=True)
class Remarking:
    """Task Arithmetic with something to say."""

    needs: ClassVar[str] = "nothing"

    def __call__(self, experts):
        return replace(TaskArithmetic()(experts), remarks=("heard",))


INSIDE = [
    pytest.param(method, option.name, id=f"{type(method).__name__}-{option.name}")
    for (method,) in (each.values for each in METHODS + QUANTISING)
    for option in fields(method)
    if type(getattr(method, option.name)) in discovered().values()
]


@pytest.mark.parametrize(("method", "option"), INSIDE)
def test_says_what_the_method_inside_it_says(method, option):
    """Such as that its descent is suspected of collapse."""
    assert merged_of(replace(method, **{option: Remarking()}), *family(2, tower())).remarks.count("heard") == 1


def test_methods_are_found():
    assert len(METHODS) >= 19 and all(method.values[0].needs in ("nothing", "inputs", "labels") for method in METHODS)
