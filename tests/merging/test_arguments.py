"""What is given by mistake is refused in one paragraph: kinds of numbers, experts, methods; empty matrices pass."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import drawn, equal, every_method, family, merged_of, models, quick
from torch import nn

from merging import Cache, Experts, UserError, merge, open_merged
from merging.checkpoints import StateDict
from merging.checkpoints.opening import open_checkpoint
from merging.checkpoints.safetensors_file import write_safetensors
from merging.decompose.ranks import Ranks
from merging.methods import Average, Duet, Single, TaskArithmetic, Ties, Twin

METHODS = [pytest.param(quick(each), id=each.__name__) for each in every_method()]
LOOKING = [case for case in METHODS if case.values[0].needs == "inputs"
           or any(hasattr(case.values[0], name) for name in ("train", "objective"))]  # fmt: skip
BLIND = [case for case in METHODS if case not in LOOKING]  # the others run the model
every = pytest.mark.parametrize("method", METHODS)
FP8, HALF, BRAIN = torch.float8_e4m3fn, torch.float16, torch.bfloat16


def one_paragraph(error):
    return "\n" not in str(error.value) and len(str(error.value)) > 60


class TestDtypes:
    @pytest.mark.parametrize("method", BLIND)
    @pytest.mark.parametrize(
        ("base", "experts", "widest"),
        [
            (HALF, [HALF, torch.float32], torch.float32),
            (HALF, [HALF, HALF, BRAIN], torch.float32),
            (torch.float32, [BRAIN, BRAIN], torch.float32),
            (BRAIN, [BRAIN, torch.float64], torch.float64),
        ],
    )
    def test_the_widest_of_all_in_any_order(self, method, base, experts, widest):
        states = [{"proj": drawn(6, 5, seed=t).to(dtype)} for t, dtype in enumerate([base, *experts])]
        names = [f"task{t}" for t in range(len(experts))]
        one = merged_of(method, states[0], states[1:], names)
        other = merged_of(method, states[0], states[:0:-1], names[::-1])
        assert one.specs["proj"].dtype == other.specs["proj"].dtype == widest

    def test_the_order_of_experts_changes_no_number(self):
        base, experts = family(2, dtype=HALF)
        experts[1] = {
            key: each.float() * 1.0009 if each.is_floating_point() else each for key, each in experts[1].items()
        }
        first, second = (models(merge(TaskArithmetic(), base, order))[0] for order in (experts, experts[::-1]))
        assert equal(first, second)

    @pytest.mark.parametrize("method", [Average(), Ties(), Twin(), Single()])
    @pytest.mark.parametrize("wrong", [torch.int8, torch.int64, torch.uint8, torch.bool, FP8, torch.complex64])
    @pytest.mark.parametrize("who", ["base", "expert"])
    def test_numbers_of_two_kinds_are_refused_from_headers(self, method, wrong, who):
        class HeaderOnly(StateDict):
            def tensor(self, key):
                raise AssertionError(f"{key} was read")

        good, bad = {"w": drawn(3, 4)}, {"w": drawn(3, 4).to(wrong)}
        base, expert = (bad, good) if who == "base" else (good, bad)
        with pytest.raises(UserError, match=r"cars \(b\) has w as .*, the base a as .* quantised weights") as error:
            merge(method, HeaderOnly(base, "a"), [HeaderOnly(expert, "b")], ["cars"])
        assert one_paragraph(error) and str(wrong)[6:] in str(error.value)

    @pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32, FP8, torch.complex64, torch.bool])
    def test_quantised_experts_are_refused(self, kind):
        states = [{"w": (100 * drawn(3, 4, seed=t)).round().to(kind), "scale": drawn(3, seed=t)} for t in range(3)]
        states[1]["w"].view(torch.uint8)[0, 0] ^= 1
        with pytest.raises(UserError, match=r"^w is of .* and shape \(3, 4\).* convert them back") as error:
            merge(Average(), states[0], states[1:])
        assert one_paragraph(error)

    @pytest.mark.parametrize(
        "kept", [torch.tensor([[True, False]]), torch.arange(6).view(1, 6), drawn(2, 3).to(FP8), drawn(2) * 1j]
    )
    def test_what_is_the_same_everywhere_is_kept(self, kept, tmp_path):
        base, experts = ({"w": drawn(3), "kept": kept}, [{"w": drawn(3, seed=t), "kept": kept.clone()} for t in (1, 2)])
        kept = kept.to(torch.complex64) if kept.is_complex() else kept
        path = merge(Average(), base, experts).save(tmp_path / "merged.safetensors")
        found = open_merged(path).base.tensor("kept")
        assert found.dtype == kept.dtype and torch.equal(found.view(torch.uint8), kept.view(torch.uint8))

    def test_counters_that_differ_stay_the_base_s_and_it_is_said(self, caplog, tmp_path):
        base, *experts = ({"w": drawn(2), "bn.num_batches_tracked": torch.tensor(count)} for count in (3, 5, 3))
        with caplog.at_level(logging.WARNING, "merging"):
            merged = merge(Average(), base, experts)
        assert [record.getMessage() for record in caplog.records] == [
            "not merged, the base's is kept although the experts' differ: bn.num_batches_tracked"
        ]
        assert load_file(merged.save(tmp_path / "merged.safetensors"))["bn.num_batches_tracked"] == 3
        assert Experts.open(base, [base]).differing == ""


class TestWhatIsNoTensor:
    @pytest.mark.parametrize(
        "dtype", [FP8, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64, torch.complex64]
    )
    def test_dtypes_of_safetensors_go_through(self, dtype, tmp_path):
        kept = (4 * drawn(5).abs()).to(dtype)
        save_file({"w": drawn(2), "kept": kept}, tmp_path / "base.safetensors")
        path = merge(Average(), tmp_path / "base.safetensors", [{"w": drawn(2, seed=1), "kept": kept}]).save(
            tmp_path / "m.safetensors"
        )
        assert torch.equal(load_file(path)["kept"].view(torch.uint8), kept.view(torch.uint8))

    def test_a_dtype_that_a_file_cannot_hold(self, tmp_path):
        state = {"w": drawn(2), "kept": torch.ones(2, dtype=torch.complex128)}
        with pytest.raises(
            UserError, match=r"Cannot write .*merged.safetensors: kept is of torch.complex128, which a safetensors file"
        ):
            merge(Average(), state, [state]).save(tmp_path / "merged.safetensors")
        with pytest.raises(UserError, match="cannot hold"):
            write_safetensors(tmp_path / "other", StateDict(state).specs(), state.items(), {})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (3, "a int, no tensor"),
            ({"weight": drawn(2)}, "a dict, no tensor"),
            (None, "a NoneType, no tensor"),
            (torch.eye(2).to_sparse(), "sparse or quantised"),
        ],
    )
    def test_a_state_dict_of_something_else(self, value, message):
        with pytest.raises(UserError, match=rf"w of a state dict is .*{message}.* module.state_dict\(\)") as error:
            open_checkpoint({"w": value})
        assert one_paragraph(error)

    def test_weights_that_were_never_loaded(self):
        empty = {"w": torch.empty(2, device="meta")}
        with pytest.raises(UserError, match="w of a state dict has no numbers: it is on the meta device"):
            merge(Average(), {"w": drawn(2)}, [empty])


BASE, EXPERTS = family(2)


class TestCalls:
    @pytest.mark.parametrize(
        ("method", "message"),
        [
            (Ties, r"the class Ties, not as an object.* Write merge\(Ties\(\), ...\)"),
            (nn.Linear(2, 2), r"a Linear\. Give an object of merging.methods"),
            ("ties", r"a str\. Give an object of merging.methods"),
            (None, "a NoneType"),
            (lambda experts: None, r"returned a NoneType\. A method is a function of Experts"),
        ],
    )
    def test_what_is_no_method(self, method, message):
        with pytest.raises(UserError, match=message) as error:
            merge(method, BASE, EXPERTS)
        assert one_paragraph(error)

    @pytest.mark.parametrize(
        ("experts", "message"),
        [
            (nn.Linear(2, 2), r"a Linear, not as a list.*\[module.state_dict\(\), ...\]"),
            (nn.ModuleList([nn.Linear(2, 2)]), "a ModuleList, not as a list"),
            ([nn.Linear(2, 2)], r"is a Linear\. Give the weights of the module: module.state_dict\(\)"),
            ([nn.Linear], r"is the class Linear\. Give the path"),
            ([3], r"is a int\. Give the path"),
            ("expert.safetensors", r"a str, not as a list.*Put it in a list"),
            (EXPERTS[0], r"a dict, not as a list.*Put it in a list"),
            ({"cars": "a.safetensors"}, r"Write experts=list\(found.values\(\)\), tasks=list\(found\)"),
            (drawn(2), "a Tensor, not as a list"),
            (None, "a NoneType, not as a list"),
        ],
    )
    def test_what_are_no_experts(self, experts, message):
        with pytest.raises(UserError, match=message) as error:
            merge(Average(), BASE, experts)
        assert one_paragraph(error)

    @pytest.mark.parametrize("base", [nn.Linear(2, 2), nn.Linear, None, 3, [BASE]])
    def test_what_is_no_base(self, base):
        with pytest.raises(UserError, match="A base or an expert is") as error:
            merge(Average(), base, EXPERTS)
        assert one_paragraph(error)

    @pytest.mark.parametrize("tasks", ["ab", {"a": 1, "b": 2}, 2, ["a", 2]])
    def test_what_are_no_names(self, tasks):
        with pytest.raises(UserError, match=r"(list of names|Names of tasks are strings)"):
            merge(Average(), BASE, EXPERTS, tasks)

    def test_what_can_be_meant_only_one_way_works(self):
        expected = models(merge(Average(), BASE, EXPERTS, ["a", "b"]))[0]
        once = merge(Average(), BASE, (each for each in EXPERTS), (name for name in "ab"))
        assert once.tasks == ("a", "b") and equal(models(once)[0], expected)

    def test_a_folder_is_no_cache(self, tmp_path):
        with pytest.raises(UserError, match=r"Write merging.Cache\(folder\)"):
            merge(Average(), BASE, EXPERTS, cache=tmp_path)
        assert merge(Average(), BASE, EXPERTS, cache=Cache(tmp_path)).tasks == ("task0", "task1")


EMPTY = {
    "proj": (0, 5),
    "text_projection": (5, 0),
    "visual.positional_embedding": (0, 0),
    "visual.conv1.weight": (0, 3, 2, 2),
    "transformer.resblocks.0.mlp.c_fc.weight": (0, 4),
    "transformer.resblocks.0.attn.in_proj_weight": (0, 4),
    "transformer.resblocks.0.attn.out_proj.weight": (0, 0),
    "visual.ln_post.bias": (3,),
}
SVD = [Duet("all", static=False), Duet(unit="block", static=False), Duet(factors="svd", static=False)]
SVD += [Duet("all", Ranks("energy", 0.1), static=False), Twin(measure="energy"), Twin(start=None), Twin(rank=0)]


@pytest.mark.parametrize("method", [*(each for each in BLIND if each.id not in ("Duet", "NeuronMask")), *SVD])
def test_empty_matrices_pass_through(method, tmp_path):
    base, experts = family(3, EMPTY)
    merged = merged_of(method, base, experts)
    again = open_merged(merged.save(tmp_path / "merged.safetensors"))
    for model, stored in zip(models(merged), models(again), strict=True):
        assert {key: tuple(weight.shape) for key, weight in model.items()} == EMPTY and equal(model, stored)
        assert model["visual.ln_post.bias"].isfinite().all()


def test_ffns_of_two_shapes_are_not_decomposed_together():
    shapes = {f"transformer.resblocks.{block}.mlp.c_fc.weight": (8, 4 + block) for block in range(2)}
    with pytest.raises(
        UserError, match=r"unit=model decomposes .* not of one shape: \(8, 4\), \(8, 5\)\. Set unit=matrix"
    ):
        merged_of(Duet(unit="model", static=False), *family(2, shapes))
