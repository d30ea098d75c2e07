"""What training wraps around names is stripped where names differ, and told; sharded checkpoints are one."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file
from samples import drawn, equal, family
from torch import nn

import merging
from merging import Experts, UserError
from merging.checkpoints import StateDict
from merging.checkpoints.opening import open_checkpoint, open_file, unwrapped
from merging.methods import TaskArithmetic


def read(checkpoint):
    return {key: checkpoint.tensor(key) for key in checkpoint.specs()}


def test_open_takes_paths_state_dicts_and_checkpoints(stored):
    base, _ = family(0)
    path = stored(base)
    file = open_checkpoint(path)
    assert equal(read(open_checkpoint(str(path))), base) and equal(read(open_checkpoint(base)), base)
    assert open_checkpoint(file) is file and file.name == str(path)


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("module.", "module."), ("_orig_mod.", "_orig_mod."), ("_orig_mod.module.", "_orig_mod. and module."),
        ("module._orig_mod.", "_orig_mod. and module."), ("module.module.", "module."),
        ("_fsdp_wrapped_module.", "_fsdp_wrapped_module."),
    ],
)  # fmt: skip
def test_wrappers_are_stripped_alone_and_nested(prefix, said):
    state = {"a.weight": drawn(2), "b.0.weight": drawn(3)}
    wrapped = StateDict({prefix + key: value for key, value in state.items()})
    bare = unwrapped(wrapped)
    assert equal(read(bare), state) and bare.id == wrapped.id
    assert bare.remarks == (f"names without {said}",)


class Compiled(nn.Module):
    """Only a part of it is compiled."""

    def __init__(self):
        super().__init__()
        self.tower, self.head = torch.compile(nn.Linear(2, 3)), nn.Linear(3, 1)


def test_wrappers_as_torch_writes_them():
    """Compared with the names of the modules themselves."""
    inner = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    compiled = Compiled()
    assert "tower._orig_mod.weight" in compiled.state_dict()
    part = {f"tower.{key}": value for key, value in compiled.tower._orig_mod.state_dict().items()}
    part |= {f"head.{key}": value for key, value in compiled.head.state_dict().items()}
    averaged = torch.optim.swa_utils.AveragedModel(inner)
    assert "n_averaged" in averaged.state_dict()
    for model, want in (
        (nn.DataParallel(inner), inner.state_dict()), (torch.compile(inner), inner.state_dict()),
        (torch.compile(nn.DataParallel(inner)), inner.state_dict()), (compiled, part),
        (averaged, averaged.module.state_dict()),
    ):  # fmt: skip
        assert equal(read(unwrapped(StateDict(model.state_dict()))), want)


def test_what_is_not_wrapped_stays_itself():
    for keys in (["a", "module.b"], ["modules.a"], ["n_averaged"], []):
        plain = StateDict({key: drawn(1) for key in keys})
        assert unwrapped(plain) is plain


def test_two_parameters_of_one_name_are_refused():
    with pytest.raises(UserError, match=r"holds a\.w twice: as a\.w and as a\._orig_mod\.w"):
        unwrapped(StateDict({"a.w": drawn(1), "a._orig_mod.w": drawn(1)}))


def test_the_library_merges_wrapped_experts_of_any_form(tmp_path):
    base, experts = family(2)
    ddp = {f"module.{key}": value for key, value in experts[0].items()}
    torch.save({"epoch": 3, "state_dict": ddp}, tmp_path / "one.pth.tar")
    save_file({f"_orig_mod.{key}": value.contiguous() for key, value in experts[1].items()}, tmp_path / "two")
    want = dict(merging.merge(TaskArithmetic(0.3), base, experts).state())

    merged = merging.merge(TaskArithmetic(0.3), base, [tmp_path / "one.pth.tar", tmp_path / "two"], ["a", "b"])

    assert equal(dict(merged.state()), want)
    told = ("a: read from its level state_dict, without epoch beside it", "a: names without module.",
            "b: names without _orig_mod.")  # fmt: skip
    assert merged.provenance["remarks"] == told
    path = merged.save(tmp_path / "merged.safetensors")
    assert equal(dict(merging.open_merged(path).state()), want)


def test_names_that_agree_stay_as_they_are():
    base, experts = family(1)
    wrap = lambda state: {f"module.{key}": value for key, value in state.items()}  # noqa: E731
    opened = Experts.open(wrap(base), [wrap(experts[0])])
    assert all(key.startswith("module.") for key in opened.specs()) and opened.remarks == ()
    assert Experts.open(wrap(base), experts).remarks == ("the base: names without module.",)


class TestSharded:
    @pytest.fixture
    def folder(self, tmp_path):
        first, second = {"a": drawn(2), "b": drawn(3)}, {"c": drawn(4)}
        save_file(first, tmp_path / "model-00001-of-00002.safetensors")
        torch.save(second, tmp_path / "pytorch_model-00002-of-00002.bin")
        names = dict.fromkeys(first, "model-00001-of-00002.safetensors")
        names |= dict.fromkeys(second, "pytorch_model-00002-of-00002.bin")
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 36}, "weight_map": names}))
        return index, {**first, **second}

    def test_it_is_one_checkpoint(self, folder, cache):
        index, want = folder
        opened = open_file(index, cache)
        assert equal(read(opened), want) and opened.name == str(index)
        ids = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(index.parent.glob("*0000*"))]
        assert opened.id == hashlib.sha256(" ".join(ids).encode()).hexdigest()
        opened.release()
        assert equal(read(opened), want)

    def test_what_is_missing_is_named(self, folder):
        index, _ = folder
        index.write_text(index.read_text().replace('"c"', '"d"'))
        with pytest.raises(UserError, match=r"index.json says that pytorch_model-00002-of-00002.bin holds d, which"):
            open_file(index)
        index.write_text(index.read_text().replace('"d"', '"c"'))
        (index.parent / "model-00001-of-00002.safetensors").unlink()
        with pytest.raises(UserError, match=r"names 2 files, and model-00001-of-00002.safetensors is not there"):
            open_file(index)

    @pytest.mark.parametrize(
        ("index_text", "reason"),
        [
            ('{"weight_map": {"a": "1.safetensors", "b": "1.safetensors", "a": "2.bin"}}', "names a twice"),
            ('{"weight_map": {"a": "1.safetensors"}, "weight_map": {}}', "names weight_map twice"),
            (
                '{"weight_map": {"a": "1.safetensors", "b": "./1.safetensors"}}',
                "b lies in .*own folder",
            ),
            ('{"weight_map": {"a": "index.json"}}', "index.json, which is an index itself"),
            ('{"weight_map": {"a": "1.safetensors", "c": "2.bin"}}', "1.safetensors and 2.bin of .* both hold a"),
        ],
        ids=["a tensor", "the map", "a file", "itself", "two files"],
    )
    def test_what_is_there_twice(self, index_text, reason, tmp_path):
        save_file({"a": drawn(2), "b": drawn(3)}, tmp_path / "1.safetensors")
        torch.save({"a": drawn(2), "c": drawn(4)}, tmp_path / "2.bin")
        (tmp_path / "index.json").write_text(index_text)
        with pytest.raises(UserError, match=reason):
            open_file(tmp_path / "index.json")

    def test_what_the_index_does_not_name_is_left_out(self, tmp_path):
        save_file({"a": drawn(2), "inv_freq": drawn(3)}, tmp_path / "1.safetensors")
        (tmp_path / "index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
        opened = open_file(tmp_path / "index.json")
        assert [*opened.specs()] == ["a"] and opened.remarks == ("without inv_freq, which the index does not name",)
