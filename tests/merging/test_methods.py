"""Every method against an independent transcription of its published steps, and the identities between methods."""

from dataclasses import replace

import published
import pytest
import torch
from samples import (
    BACKBONE,
    SHAPES,
    applied,
    drawn,
    equal,
    every_method,
    family,
    models,
    opened,
    quick,
    task_vectors,
    tower,
)

from merging import UserError, merge
from merging.methods import Average, Base, Dare, Expert, IsoC, IsoCts, Single, TaskArithmetic, Ties, TsvM

# fp32 weights below 8 are 2^-21 = 5e-7 apart, and sums of our samples are exact: rounding the product with the scale
# and the result leaves one spacing. A decomposition in fp64 whose factors are kept in fp32 loses about a digit more.
ROUNDING, FACTORS = 1e-6, 1e-5

CASES = [
    pytest.param(Base(), lambda taus: published.task_arithmetic(taus, 0), 0, id="base"),
    pytest.param(Average(), published.average, ROUNDING, id="average"),
    pytest.param(TaskArithmetic(0.3), lambda taus: published.task_arithmetic(taus, 0.3), ROUNDING, id="arithmetic"),
    pytest.param(Ties(), lambda taus: published.ties(taus, 0.2, "sum", 0.3), ROUNDING, id="ties sum"),
    pytest.param(Ties(0.3, "mean", 1), lambda taus: published.ties(taus, 0.3, "mean", 1), ROUNDING, id="ties mean"),
    pytest.param(Ties(1, "mean", 1), lambda taus: published.ties(taus, 1, "mean", 1), ROUNDING, id="ties untrimmed"),
    pytest.param(TsvM(1.2), lambda taus: published.tsv_m(taus, 1.2), FACTORS, id="tsv-m"),
    pytest.param(IsoC(1.3), lambda taus: published.iso_c(taus, 1.3), FACTORS, id="iso-c"),
    pytest.param(IsoCts(0.8, 1.5), lambda taus: published.iso_cts(taus, 0.8, 1.5), FACTORS, id="iso-cts"),
    pytest.param(IsoCts(0.5, 1), lambda taus: published.iso_cts(taus, 0.5, 1), FACTORS, id="iso-cts half"),
]


def assert_change(merged, base, change, tolerance):
    """`merged` is `base` plus `change` to within an absolute tolerance."""
    (model,) = models(merged)
    assert model.keys() == change.keys()
    for key, weight in model.items():
        assert torch.allclose(weight.double(), base[key].double() + change[key], rtol=0, atol=tolerance), key


@pytest.mark.parametrize(("method", "reference", "tolerance"), CASES)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_equals_the_published_steps(method, reference, tolerance, tasks):
    base, experts = family(tasks)
    assert_change(merge(method, base, experts), base, reference(task_vectors(base, experts)), tolerance)


def test_kinds_of_parameters_may_have_coefficients_of_their_own():
    """A search for the scale leaves them where they are."""
    base, experts = family(3, tower())
    kinds = {"norm": 0.0, "attention": 0.5, "attention_out": 0.1, "other": 0.2, "projection": 0.4}
    merged = TaskArithmetic(0.3, kinds=kinds)(opened(base, experts))
    plain = {scale: models(merge(TaskArithmetic(scale), base, experts))[0] for scale in (0.3, 0.7, *kinds.values())}
    seen = set()
    for scale in (0.3, 0.7):
        for key, weight in merged.scaled(scale).state():
            kind = BACKBONE.param(key).kind
            expected = {"attention_qkv": 0.5, "embedding": 0.2, "ffn_in": scale, "ffn_out": scale} | kinds
            assert torch.allclose(weight, plain[expected[kind]][key], atol=ROUNDING)
            seen.add(kind)
    assert seen == {"norm", "attention_qkv", "attention_out", "ffn_in", "ffn_out", "embedding", "projection"}
    with pytest.raises(UserError, match=r"kinds has 'mlp'. Kinds are ffn, attention, ffn_in, .*, norm, embedding, "):
        TaskArithmetic(kinds={"mlp": 1.0})
    with pytest.raises(UserError, match=r"kinds.ffn=200 is out of range"):
        TaskArithmetic(kinds={"ffn": 200})


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("then", [Average(), TaskArithmetic(0.3), Ties(0.2, "sum", 0.3)])
def test_dare_equals_the_published_steps(tasks, then):
    base, experts = family(tasks)
    drop = 0.75  # rescales by 4, exact in fp32
    masks = dropped(base, experts, Dare(drop)).pop("masks")
    reference = {
        Average: published.average,
        TaskArithmetic: lambda taus: published.task_arithmetic(taus, 0.3),
        Ties: lambda taus: published.ties(taus, 0.2, "sum", 0.3),
    }[type(then)]
    change = published.dare(task_vectors(base, experts), masks, drop, reference)
    assert_change(merge(Dare(drop, then=then), base, experts), base, change, 4 * ROUNDING)


def dropped(base, experts, method, tasks=None):
    """What `method` hands to the method behind it: {key: tau after the drop}, and the masks."""
    seen = {}

    def then(sparse):
        seen.update({key: sparse.tau(key) for key in sparse.specs()})
        return sparse.merged({})

    merge(replace(method, then=then), base, experts, tasks)
    return {"masks": {key: tau != 0 for key, tau in seen.items()}, **seen}


def test_dare_without_drop_is_the_method_behind_it():
    base, experts = family(3)
    for then in (Average(), TaskArithmetic(), Ties(), TsvM()):
        sparse, plain = merge(Dare(0, then=then), base, experts), merge(then, base, experts)
        assert equal(*models(sparse), *models(plain)) and sparse.scale == plain.scale


def test_dare_masks_depend_on_name_and_task_alone():
    base, experts = family(3)
    names = ["a", "b", "c"]
    first = dropped(base, experts, Dare(), names)
    turned = dropped(base, experts[::-1], Dare(), names[::-1])
    fewer = ("wide.weight", "cube")
    part, *parts = ({key: state[key] for key in fewer} for state in (base, *experts))
    alone = dropped(part, parts, Dare(), names)
    assert all(torch.equal(first[key], turned[key].flip(0)) for key in SHAPES)
    assert all(torch.equal(first[key], alone[key]) for key in fewer)
    masks = first["masks"]["wide.weight"]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks, dropped(base, experts, Dare(seed=1), names)["masks"]["wide.weight"])


def test_dare_is_unbiased():
    base, tau = {"w": torch.zeros(4)}, torch.tensor([1.0, -2.0, 0.5, 3.0])
    draws = [merge(Dare(0.5, seed, TaskArithmetic(1.0)), base, [{"w": tau}]).weight("w") for seed in range(400)]
    # each draw is 0 or 2 tau: the mean of 400 has standard deviation |tau| / 20, and five of them are allowed
    assert torch.all((torch.stack(draws).mean(0) - tau).abs() < 5 * tau.abs() / 20)


def test_identities_between_methods():
    base, experts = family(3)
    (iso_c,), (iso_cts,) = models(merge(IsoC(), base, experts)), models(merge(IsoCts(1.0), base, experts))
    (mean,), (scaled,) = models(merge(Average(), base, experts)), models(merge(TaskArithmetic(1 / 3), base, experts))
    for key in SHAPES:
        assert torch.allclose(iso_c[key], iso_cts[key], rtol=0, atol=FACTORS)
        assert torch.allclose(mean[key], scaled[key], rtol=0, atol=ROUNDING)
    (still,) = models(merge(TaskArithmetic(0), base, experts))
    assert equal(still, {key: base[key] for key in SHAPES})


def test_average_is_the_mean_of_the_experts_in_half_precision():
    base, experts = family(8, dtype=torch.bfloat16)
    merged = merge(Average(), base, experts)
    (model,) = models(merged)
    for key in SHAPES:
        mean = torch.stack([expert[key].double() for expert in experts]).mean(0)
        assert torch.allclose(merged.unrounded(key).double(), mean, rtol=0, atol=ROUNDING)
        assert torch.equal(model[key], merged.unrounded(key).bfloat16().float())  # as it is stored


def test_expert_gives_every_task_its_own_weights():
    base, experts = family(3)
    merged = merge(Expert(), base, experts)
    for expert, model in zip(experts, models(merged), strict=True):
        assert equal(model, {key: expert[key] for key in model})
    for task, expert in enumerate(experts):
        assert equal(*models(merge(Single(task), base, experts)), {key: expert[key] for key in SHAPES})
    half = merged.weight("cube", torch.tensor([0.5, 0.5, 0.0]))
    assert torch.allclose(half, (experts[0]["cube"] + experts[1]["cube"]) / 2, rtol=0, atol=ROUNDING)
    with pytest.raises(UserError, match="cube depends on the input"):
        merged.weight("cube")


def test_matrices_with_fewer_rows_than_tasks():
    """TSV-M has no triplet to give each task and averages; Iso-CTS keeps to the common directions."""
    base, experts = family(5, {"w": (3, 10), "v": (6, 5)})
    (model,), taus = models(merge(TsvM(), base, experts)), task_vectors(base, experts)
    assert torch.allclose(model["w"].double(), base["w"] + taus["w"].mean(0), rtol=0, atol=ROUNDING)
    (shared,), (iso_c,) = models(merge(IsoCts(0.0), base, experts)), models(merge(IsoC(), base, experts))
    assert torch.allclose(shared["w"], iso_c["w"], rtol=0, atol=FACTORS)


def test_iso_c_leaves_directions_without_a_task_vector_alone():
    base = {"w": drawn(12, 10)}
    tau = drawn(12, 2, seed=1) @ drawn(2, 10, seed=2)
    change = merge(IsoC(), base, [{"w": base["w"] + tau}]).weight("w") - base["w"]
    u, s, vh = torch.linalg.svd(tau)
    assert torch.allclose(change, s.mean() * u[:, :2] @ vh[:2], rtol=0, atol=FACTORS)


def test_scaled_changes_the_coefficient_and_nothing_else():
    base, experts = family(2)
    for method in (TaskArithmetic, Ties, TsvM, IsoC, IsoCts):
        rescaled, direct = merge(method(), base, experts).scaled(0.7), merge(method(scale=0.7), base, experts)
        assert equal(*models(rescaled), *models(direct))
    assert merge(Average(), base, experts).scale is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ties(density=0), r"ties: density=0 .*\(0.0, 1.0\]"),
        (lambda: Ties(density=1.5), "density=1.5 is out of range"),
        (lambda: Ties(merge="max"), "merge='max' is unknown. Choose one of sum, mean"),
        (lambda: Dare(drop=1), "dare: drop=1 is out of range"),
        (lambda: Dare(drop=float("nan")), "drop=nan is out of range"),
        (lambda: IsoCts(common=-0.1), r"iso_cts: common=-0.1 .*\[0.0, 1.0\]"),
    ],
)
def test_knob_out_of_range(build, message):
    with pytest.raises(UserError, match=message):
        build()


ELSEWHERE = {  # of static methods, by the file that compares them
    "here, or of what is trained and measured": "Dare LinearProbe Multitask Single",
    "test_ada_merging": "AdaMerging",
    "test_concrete": "Concrete",
    "test_entry_methods": "Consensus MagMax Pcb Ram Sce",
    "test_fisher": "Fisher",
    "test_fw_merging": "FwHard FwSoft",
    "test_learned, test_learned_cat": "Atlas ExpertMerging LearnedCat",
    "test_learned_localize": "LearnedLocalizeAndStitch",
    "test_lines": "Lines",
    "test_lora_methods": "AsAdapter Cat DoMerging Knots",
    "test_mask_methods": "NeuronMask",
    "test_reg_mean, test_regression, test_feat_cal, test_bayesian": "Bayesian FeatCal Lot RegMean RegMeanPp",
    "test_pwe_moe": "PweMoe",
    "test_row_sparsifiers": "Breadcrumbs Della",
    "test_self_positioning": "SelfPositioning",
    "test_spectral_methods": "Resm",
    "test_spheres": "Karcher",
    "test_surgery": "Surgery",
    "test_switch_methods": "LocalizeAndStitch",
    "test_evo_merging and other files of methods that search": "EvoMerging Map Recombination",
    "test_wudi and other files of methods of matrices": "Aswudi DcMerge Doge Opcm OptMerge Swudi Wudi",
}


def test_every_static_method_is_compared():
    """Those with deltas are compared in test_dynamic_methods, test_mask_methods, and files of their own."""
    found = opened(*family(1, tower()))
    static = {each.__name__ for each in every_method() if not applied(quick(each), found).deltas}
    here = {type(case.values[0]).__name__ for case in CASES}
    assert static == here.union(*map(str.split, ELSEWHERE.values()))
