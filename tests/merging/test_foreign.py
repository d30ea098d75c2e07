"""Pickles of every layout give bit-equal tensors, and nothing in them runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clips import encoder_state, foreign_code, image_encoder, inert_state, whole, write_encoder
from torch import nn

from merging import merge
from merging.checkpoints import SafetensorsFile
from merging.checkpoints.pickles import PickleFile
from merging.checkpoints.views import below, completed, selected
from merging.errors import UserError
from merging.methods import Average
from merging.qkv import separated

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
        f"import sys; from merging.checkpoints.pickles import PickleFile; assert PickleFile({str(path)!r}).specs(); "
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


def trained(model):
    """A model after one step of Adam, and the optimizer, which then holds tensors of every parameter."""
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return optimizer


def test_the_only_level_with_weights_is_taken_and_told(tmp_path):
    model = nn.Linear(3, 4)
    optimizer = trained(model).state_dict()
    want = {key: value.detach() for key, value in model.state_dict().items()}
    noise = {"epoch": 3, "best": torch.tensor(0.5), "rng_state": torch.get_rng_state(), "class_weights": torch.ones(2)}
    lightning = {
        "state_dict": want, "optimizer_states": [optimizer], "hyper_parameters": {"prior": torch.ones(3)},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9), "best": torch.ones(1)}},
    }  # fmt: skip
    for level, value in {
        "weights": {"weights": want, **noise},
        "ema": {"ema": model, "optimizer": optimizer},
        "state_dict": lightning,
        "checkpoint.net": {"checkpoint": {"net": want, "optimiser": optimizer}, **noise},
    }.items():
        file = PickleFile(stored(tmp_path, value))
        assert_same({key: file.tensor(key) for key in file.specs()}, want)
        (remark,) = file.remarks
        beside = [name for name in value if name != level.partition(".")[0]]
        assert remark.startswith(f"read from its level {level}, without {', '.join(beside)}")
    assert PickleFile(stored(tmp_path, want)).remarks == ()
    same = {"model": want, "state_dict": want}  # one thing under two names
    assert_same(inert_state(stored(tmp_path, same)), want)


def test_two_levels_with_weights_are_refused_by_name(tmp_path):
    one, other = nn.Linear(3, 4).state_dict(), nn.Linear(3, 4).state_dict()
    for value, names in (
        ({"model": one, "ema": other}, "model, ema"),
        ({"net": {"model": one, "head": other}}, r"net\.model, net\.head"),
        ({**{f"layer.{key}": each for key, each in one.items()}, "teacher": other}, "its top level, teacher"),
    ):
        with pytest.raises(UserError, match=f"zip.pt.*holds weights more than once, as {names}.*not guessed") as told:
            inert_state(stored(tmp_path, value))
        assert "damaged" not in str(told.value)


def test_whole_pickles_of_something_else_are_not_called_damaged(tmp_path):
    model = nn.Linear(3, 4)
    for value, message in (
        (trained(model).state_dict(), "holds no tensors"),
        ([1, 2], "holds a list, neither a module nor a state dict"),
        (torch.device("cpu"), "holds a torch.device, neither"),
        ({"sparse": torch.eye(3).to_sparse()}, "sparse"),
    ):
        with pytest.raises(UserError, match=message) as told:
            inert_state(stored(tmp_path, value))
        assert "damaged" not in str(told.value) and "What works" in str(told.value)


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
    (tmp_path / "weights.pt").touch()
    with pytest.raises(UserError, match=r"is a folder. Give the path of the weight file .*: it holds weights.pt"):
        inert_state(tmp_path)


def test_the_id_is_that_of_the_file(tmp_path, cache):
    path = write_encoder(tmp_path / "expert.pt", STATE)
    sha = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert PickleFile(path).id == PickleFile(path, cache).id == PickleFile(path, cache).id == sha
    assert PickleFile(path).name == str(path)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_read_when_they_are_asked_for(tmp_path, form):
    """Memory holds no pickle as a whole, writing to a tensor never reaches the file, and released pages come back."""
    state = {"model.visual.proj": torch.arange(40_000.0), "model.logit_scale": torch.tensor(4.0)}
    path = write_encoder(
        tmp_path / "expert.pt", {key.removeprefix("model."): value for key, value in state.items()}, form
    )
    content = path.read_bytes()
    file = PickleFile(path)
    memory = file._tensors["model.visual.proj"].storage.memory
    assert (memory.obj if isinstance(memory, memoryview) else memory) is file._map

    file.tensor("model.visual.proj").zero_()
    file.release()

    assert path.read_bytes() == content
    assert_same({key: file.tensor(key) for key in state}, state)


def test_what_was_read_is_not_saved_over(tmp_path, cache, stored):
    """The pickle, and the file behind every view."""
    path = write_encoder(tmp_path / "expert.pt", STATE)
    expert, base = PickleFile(path, cache), SafetensorsFile(stored(encoder_state(STATE)))
    merged = merge(Average(), below(base, ""), [expert])
    assert expert.files == (path,) and separated(expert).files == (path,)
    assert completed(selected(expert, ()), base, expert.specs()).files == (path, base.path)
    before = [each.read_bytes() for each in (path, base.path)]
    for target in (path, base.path):
        with pytest.raises(UserError, match="is one of the inputs"):
            merged.save(target)
    assert [each.read_bytes() for each in (path, base.path)] == before


def test_an_id_is_of_what_was_opened(tmp_path):
    path = stored(tmp_path, {"w": torch.zeros(3)})
    file = PickleFile(path)
    stored(tmp_path, {"w": torch.ones(7)})
    with pytest.raises(UserError, match=r"zip\.pt was changed since it was opened"):
        _ = file.id
