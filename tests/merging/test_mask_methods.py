"""Methods that keep some entries or neurons of each task vector: TALL-masks, EMR, neuron masks, pruned WEMoE."""

import published
import pytest
import torch
from samples import (
    BACKBONE,
    SHAPES,
    Made,
    applied,
    context,
    drawn,
    equal,
    family,
    merged_of,
    models,
    opened,
    task_vectors,
    tower,
)

from merging import UserError, merge
from merging.methods import Average, Dare, Emr, NeuronMask, TallMask, TaskArithmetic, Ties, TsvM, Wemoe
from merging.neurons import Neurons

ROUNDING = 1e-6  # as in test_methods
FC, PROJ = ("visual.transformer.resblocks.{}.mlp." + name for name in ("c_fc.", "c_proj."))
BY_TASK = [
    pytest.param(Emr(), published.emr, id="emr"),
    pytest.param(Emr("entry"), lambda taus: published.emr(taus, per_parameter=False), id="emr by entry"),
    pytest.param(TallMask(), lambda taus: published.tall_masks(taus, 0.4), id="tall masks"),
    pytest.param(TallMask(0.2), lambda taus: published.tall_masks(taus, 0.2), id="tall masks 0.2"),
]


@pytest.mark.parametrize(("method", "reference"), BY_TASK)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_equals_the_published_steps(method, reference, tasks):
    base, experts = family(tasks)
    changes = reference(task_vectors(base, experts))
    for task, model in enumerate(models(merge(method, base, experts))):
        for key, weight in model.items():
            assert torch.allclose(weight.double(), base[key] + changes[key][task], rtol=0, atol=4 * ROUNDING), key


@pytest.mark.parametrize("method", [Emr(), Emr("entry"), TallMask(), TallMask(0)])
def test_one_task_is_its_expert(method):
    base, experts = family(1)
    assert equal(*models(merge(method, base, experts)), {key: experts[0][key] for key in SHAPES})


@pytest.mark.parametrize("method", [Emr(), Emr("entry"), TallMask(0.3)])
def test_stores_one_vector_and_a_bit_per_entry_and_task(method):
    base, experts = family(3)
    sizes = [tensor.numel() for tensor in base.values() if tensor.is_floating_point()]
    merged = merge(method, base, experts)
    deltas = sum(delta.bytes for delta in merged.deltas.values())
    assert deltas == sum(4 * size + 3 * -(-size // 8) + 3 * 4 for size in sizes)
    assert merged.routing.router == "oracle" and merged.scale is None


@pytest.mark.parametrize("tasks", [2, 5])
def test_emr_never_turns_a_sign_and_keeps_the_magnitude(tasks):
    base, experts = family(tasks)
    taus = task_vectors(base, experts)
    for method, size in ((Emr(), lambda x: x.abs().mean()), (Emr("entry"), lambda x: x.abs().sum())):
        merged = merge(method, base, experts)
        for task in range(tasks):
            mixed = {key: merged.deltas[key].mix(merged.one_hot(task)).double() for key in SHAPES}
            assert all((mixed[key] * taus[key][task] >= 0).all() for key in SHAPES)
            kept, whole = (sum(size(each[key]) for key in SHAPES) for each in (mixed, {k: taus[k][task] for k in taus}))
            assert float(kept) == pytest.approx(float(whole), rel=1e-6)


def test_emr_counts_a_mean_of_zero_as_negative():
    base, tau = {"w": torch.zeros(3)}, torch.tensor([1.0, -2.0, 0.5])
    merged = merge(Emr("entry"), base, [{"w": tau}, {"w": -tau}])
    assert torch.equal(merged.deltas["w"].vector, -tau.abs())
    assert merged.deltas["w"].mask(0).tolist() == [False, True, False]
    assert merged.deltas["w"].mask(1).tolist() == [True, False, True]


@pytest.mark.parametrize("method", [Emr(), TallMask()])
def test_what_a_task_left_alone_stays_the_base(method):
    base, experts = family(3)
    experts[0]["cube"] = base["cube"].clone()
    experts[0]["wide.weight"][2] = base["wide.weight"][2]
    model = models(merge(method, base, experts))[0]
    assert torch.equal(model["cube"], base["cube"])
    assert torch.equal(model["wide.weight"][2], base["wide.weight"][2])


def active(expert, images, block):
    """Mean |activation| of a block's hidden neurons, written down without merging.calibration."""
    model, seen = BACKBONE.build(), []
    model.load_state_dict({key: expert[key] for key in model.state_dict()})
    gelu = model.visual.transformer.resblocks[block].mlp.gelu
    gelu.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(images)
    return seen[0].abs().mean((0, 1))


def test_neuron_masks_keep_the_rows_and_columns_of_active_neurons_alone():
    base, experts = family(3, tower(), size=0.25)
    found, seen = opened(base, experts), {}
    applied(NeuronMask(Neurons(0.25), then=lambda sparse: seen.update(dict_of(sparse)) or sparse.merged({})), found)
    taus, untouched = dict_of(found), set(seen)
    for block in range(2):
        for task, expert in enumerate(experts):
            images = context(found).unlabelled().inputs(task, torch.arange(24))
            kept = torch.zeros(64).index_fill(0, active(expert, images, block).topk(16).indices, 4.0)  # 1 / density
            for name, factor in ((FC + "weight", kept[:, None]), (FC + "bias", kept), (PROJ + "weight", kept)):
                key = name.format(block)
                assert torch.equal(seen[key][task], taus[key][task] * factor), key
                untouched.discard(key)
    assert PROJ.format(0) + "bias" in untouched and len(untouched) == len(seen) - 6
    assert all(torch.equal(seen[key], taus[key]) for key in untouched)


def dict_of(experts):
    return {key: experts.tau(key) for key in experts.specs()}


@pytest.mark.parametrize("then", [Average(), TaskArithmetic(), Ties(), TsvM(), Emr(), Wemoe(), Dare(0.5)])
@pytest.mark.parametrize("scale", ["inverse_density", "energy", "density", "none"])
def test_all_neurons_are_the_method_behind_them(then, scale):
    base, experts = family(3, tower())
    masked = merged_of(NeuronMask(Neurons(1.0, scale=scale), then=then), base, experts)
    plain = merged_of(then, base, experts)
    assert all(map(equal, models(masked), models(plain))) and masked.scale == plain.scale


def test_neurons_are_measured_once_and_only_where_there_are_any():
    base, experts = family(2, tower())
    found, asked = opened(base, experts), []
    counting = Made(lambda split: asked.append(split) or context(found).unlabelled(split))
    NeuronMask(then=Ties())(found, context(found, counting))
    assert len(asked) == 1
    base, experts = family(2, {"visual.conv1.weight": (4, 3, 2, 2), "logit_scale": ()})
    assert all(map(equal, models(merge(NeuronMask(), base, experts)), models(merge(TaskArithmetic(), base, experts))))
    with pytest.raises(UserError, match="unlabelled calibration inputs"):
        merge(NeuronMask(), *family(2, tower()))


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.9])
def test_pruned_wemoe_keeps_exactly_the_largest_entries(density):
    """Also among entries of few different magnitudes: then the first of equals stay."""
    shapes = {
        "transformer.resblocks.0.mlp.c_fc.weight": (12, 7),
        "transformer.resblocks.0.mlp.c_fc.bias": (12,),
        "transformer.resblocks.0.mlp.c_proj.bias": (1,),
    }
    base = {key: drawn(*shape) for key, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    taus = {key: torch.randint(-3, 4, (2, *shape), generator=generator).float() for key, shape in shapes.items()}
    merged = merge(Wemoe(density), base, [{key: base[key] + taus[key][t] for key in shapes} for t in range(2)])
    for key, tau in taus.items():
        for kept, whole in zip(merged.deltas[key].changes, tau, strict=True):
            order = whole.flatten().abs().argsort(descending=True, stable=True)
            expected = torch.zeros(whole.numel())
            some = order[: max(1, round(density * whole.numel()))]
            expected[some] = whole.flatten()[some]
            assert torch.equal(kept.flatten(), expected), key
