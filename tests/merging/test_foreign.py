"""Pickles of every layout give bit-equal tensors, and nothing in them runs."""

import json
import os
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from clips import encoder_state, foreign_code, image_encoder, whole, write_encoder
from safetensors.torch import load_file
from torch import nn

from merging import foreign, merge
from merging.checkpoints import SafetensorsFile
from merging.errors import UserError
from merging.foreign import convert, inert_state, open_file, open_foreign
from merging.inert import Machine
from merging.methods import Average
from merging.views import Overlay, Part, Separate

FORMS = ("zip", "legacy", "plain")
STATE = whole(3, words=50)


def assert_same(got, want):
    assert list(got) == list(want)
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype and got[key].shape == tensor.shape
        assert torch.equal(got[key].contiguous().view(-1), tensor.contiguous().view(-1)), key


def stored(folder, value, form="zip", **options):
    """A file that torch.save wrote."""
    path = folder / f"{form}.pt"
    torch.save(value, path, _use_new_zipfile_serialization=form == "zip", **options)
    return path


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("module", [True, False])
def test_encoders_are_read_bit_by_bit_without_their_code(tmp_path, form, module):
    path = write_encoder(tmp_path / "expert.pt", STATE, form, module)
    with foreign_code() as classes:
        reference = image_encoder(STATE, classes)
        want = {key: value.detach() for key, value in reference.state_dict().items()}

    got = inert_state(path)

    assert got.keys() == want.keys() == encoder_state(STATE).keys()
    assert "model.attn_mask" in dict(reference.named_buffers()) and "model.attn_mask" not in got
    assert_same({key: got[key] for key in want}, want)


def test_reading_imports_nothing_of_theirs(tmp_path):
    path = write_encoder(tmp_path / "expert.pt", STATE)
    code = (
        f"import sys; from merging.foreign import inert_state; assert inert_state({str(path)!r}); "
        "sys.exit(', '.join({'src', 'open_clip', 'torchvision', 'datasets'} & {*sys.modules}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_all_protocols_types_and_views(tmp_path, form, protocol):
    random = torch.Generator().manual_seed(0)
    square = torch.randn(6, 6, generator=random)
    state = {
        "half": torch.randn(3, 4, generator=random).half(), "brain": torch.randn(5, generator=random).bfloat16(),
        "double": torch.randn(2, generator=random).double(), "long": torch.arange(7), "byte": torch.arange(9).byte(),
        "flag": torch.tensor([True, False]), "number": torch.tensor(2.5), "none": torch.empty(0, 3),
        "square": square, "turned": square.T, "row": square[2], "column": square[:, 1], "steps": square[1::2, ::3],
        "again": square,
    }  # fmt: skip
    assert_same(inert_state(stored(tmp_path, state, form, pickle_protocol=protocol)), state)


def test_parameters_wrappers_and_nested_modules(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2, bias=False)))
    model[0].bias.requires_grad_(False)
    model[0].note = "kept by nobody"
    want = {key: value.detach() for key, value in model.state_dict().items()}
    for value in (model, {"epoch": 3, "state_dict": model.state_dict()}, {"model": model, "optimizer": {"lr": 0.1}}):
        assert_same(inert_state(stored(tmp_path, value)), want)


def test_a_module_that_holds_itself_ends(tmp_path):
    module = nn.Module()
    module._modules["again"] = module
    twice = nn.Module()
    for _ in range(40):
        outer = nn.Module()
        outer._modules |= {"left": twice, "right": twice}
        twice = outer
    for value in (module, twice):
        with pytest.raises(UserError, match="modules"):
            inert_state(stored(tmp_path, value))


def test_unknown_kinds_of_tensors_are_refused_not_skipped(tmp_path):
    state = {"weight": torch.ones(2), "sparse": torch.eye(3).to_sparse()}
    with pytest.raises(UserError, match="sparse"):
        inert_state(stored(tmp_path, state))


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("form", FORMS)
def test_truncated_files_are_refused(tmp_path, form):
    content = write_encoder(tmp_path / "whole.pt", STATE, form).read_bytes()
    path = tmp_path / "part.pt"
    for share in (0.0, 0.001, 0.3, 0.7, 0.99, 1 - 1 / len(content)):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match=r"part\.pt"):
            inert_state(path)


def test_missing_files_and_folders_are_told(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        inert_state(tmp_path / "none.pt")
    with pytest.raises(UserError, match="Cannot read"):
        inert_state(tmp_path)


def test_a_pickle_is_read_once(tmp_path, cache, monkeypatch):
    path = write_encoder(tmp_path / "expert.pt", STATE)
    first = open_foreign(path, cache)
    stat = path.stat()
    path.write_bytes(b"x" * stat.st_size)  # what is remembered is path, size and time
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    monkeypatch.setattr(Machine, "run", None)

    again = open_foreign(path, cache)

    assert again.id == first.id and again.name == str(path)
    assert_same({key: again.tensor(key) for key in encoder_state(STATE)}, encoder_state(STATE))


def test_a_copy_is_found_by_its_content(tmp_path, cache, monkeypatch):
    path = write_encoder(tmp_path / "expert.pt", STATE)
    converted = convert(path, tmp_path / "made", cache)
    path.rename(tmp_path / "moved.pt")
    monkeypatch.setattr(Machine, "run", None)
    assert convert(tmp_path / "moved.pt", tmp_path / "made", cache) == converted


def test_a_copy_that_older_code_made_is_made_again(tmp_path, cache, monkeypatch):
    path = write_encoder(tmp_path / "expert.pt", STATE)
    with monkeypatch.context() as older:
        older.setattr(foreign, "FORMAT", "0")
        converted = convert(path, tmp_path / "made", cache)
    written = converted.stat().st_ino
    assert convert(path, tmp_path / "made", cache) == converted and converted.stat().st_ino != written
    assert foreign.SafetensorsFile(converted).metadata["format"] == foreign.FORMAT


def test_the_converted_file_tells_where_it_comes_from(tmp_path, cache):
    path = write_encoder(tmp_path / "expert.pt", STATE)
    converted = convert(path, tmp_path / "made")
    checkpoint = open_foreign(path, cache)

    sha = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert converted.stem == sha == checkpoint.id
    metadata = foreign.SafetensorsFile(converted).metadata
    assert metadata["source"] == "expert.pt" and metadata["source_sha256"] == sha
    names = {arg.replace(" ", ".") for op, arg, _ in pickletools.genops(pickled(path)) if op.name == "GLOBAL"}
    known = {name for name in names if name.startswith(("torch._utils", "torch.Float", "collections"))}
    called = names - known - {"open_clip.transform._convert_to_rgb", "builtins.set", "__builtin__.set"}
    assert set(json.loads(metadata["replaced_globals"])) == called
    assert load_file(converted).keys() == encoder_state(STATE).keys()


def pickled(path):
    with zipfile.ZipFile(path) as archive:
        return archive.read(f"{archive.namelist()[0].partition('/')[0]}/data.pkl")


def test_a_failed_conversion_leaves_nothing(tmp_path):
    path = tmp_path / "expert.pt"
    path.write_bytes(write_encoder(tmp_path / "whole.pt", STATE).read_bytes()[:-100])
    with pytest.raises(UserError):
        convert(path, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_files_open_by_their_ending(tmp_path, cache, stored):
    pickle_file = write_encoder(tmp_path / "expert.pt", STATE)
    safe_file = stored(encoder_state(STATE))
    for path in (pickle_file, safe_file):
        checkpoint = open_file(path, cache)
        assert_same({key: checkpoint.tensor(key) for key in encoder_state(STATE)}, encoder_state(STATE))


def test_what_was_read_is_not_saved_over(tmp_path, cache, stored):
    """The pickle, its converted copy in the cache, and the file behind every view."""
    path = write_encoder(tmp_path / "expert.pt", STATE)
    expert, base = open_foreign(path, cache), SafetensorsFile(stored(encoder_state(STATE)))
    (converted,) = (cache.folder / "converted").iterdir()
    merged = merge(Average(), Part(base, ""), [expert])
    assert expert.files == (path, converted) and Separate(expert).files == (path, converted)
    assert Overlay(expert, base, ()).files == (path, converted, base.path)
    before = [each.read_bytes() for each in (path, converted, base.path)]
    for target in (path, converted, base.path):
        with pytest.raises(UserError, match="is one of the inputs"):
            merged.save(target)
    assert [each.read_bytes() for each in (path, converted, base.path)] == before
