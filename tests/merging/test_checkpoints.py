"""Checkpoints: headers before weights, the same bytes as the reference library, and files that are no checkpoints."""

import contextlib
import hashlib
import json
import os
import pickle
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from samples import drawn, equal

from merging import UserError
from merging.checkpoints import DTYPES, SafetensorsFile, Spec, StateDict
from merging.checkpoints.safetensors_file import write_safetensors
from merging.checkpoints.views import View, below, join_pieces, pieces_of


def one_of_each():
    """A tensor of every dtype, of odd sizes so that many start at odd offsets, beside scalar and empty ones."""
    values = 4 * drawn(3, 5)
    tensors = {name: (values > 0 if dtype is torch.bool else values.to(dtype)) for name, dtype in DTYPES.items()}
    return tensors | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3)}


def read(checkpoint):
    return {key: checkpoint.tensor(key) for key in checkpoint.specs()}


def rewritten(path, header=None, data=b""):
    """A file with this JSON value as its header, whether that makes sense or not."""
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def test_reads_what_the_reference_library_wrote(stored):
    tensors = one_of_each()
    file = SafetensorsFile(stored(tensors, {"made": "today"}))
    assert file.metadata == {"made": "today"}
    assert file.specs() == {key: Spec(tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
    assert equal(read(file), tensors)


def test_the_reference_library_reads_what_we_wrote(tmp_path):
    tensors = one_of_each() | {"transposed": drawn(3, 4).T}
    path = write_safetensors(
        tmp_path / "ours.safetensors", StateDict(tensors).specs(), tensors.items(), {"made": "today"}
    )
    assert equal(load_file(path), tensors) and equal(read(SafetensorsFile(path)), tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"made": "today"}


def test_a_write_that_breaks_its_own_header_leaves_no_file(tmp_path):
    specs = {"w": Spec(torch.Size([2]), torch.float32)}
    for tensors in ([("w", torch.zeros(3))], [("v", torch.zeros(2))], [("w", torch.zeros(2).half())], []):
        with pytest.raises(ValueError):
            write_safetensors(tmp_path / "new", specs, tensors, {})
    assert not list(tmp_path.iterdir())


def test_the_header_is_read_without_the_weights(stored):
    path = stored({"w": drawn(1000)})
    with path.open("r+b") as file:  # a hole in place of the data: same header, same size
        file.truncate(path.stat().st_size - 4000)
        file.truncate(path.stat().st_size + 4000)
    file = SafetensorsFile(path)
    assert file.specs()["w"] == Spec(torch.Size([1000]), torch.float32) and file.specs()["w"].bytes == 4000
    assert not [name for name in vars(file) if name in ("_map", "id")]  # neither mapped nor hashed


def test_writing_to_a_tensor_never_reaches_the_file(stored):
    tensors = {"w": drawn(2000)}
    path = stored(tensors)
    file = SafetensorsFile(path)
    file.tensor("w").zero_()
    assert equal(load_file(path), tensors)
    file.release()
    assert equal(read(file), tensors)


def test_released_pages_come_back(stored):
    tensors = one_of_each()
    file = SafetensorsFile(stored(tensors))
    file.release()  # before anything was read
    held = read(file)
    file.release()
    assert equal(held, tensors)


def test_id_of_a_file_is_the_sha256_of_its_content(stored):
    path = stored({"w": drawn(5)})
    assert SafetensorsFile(path).id == hashlib.sha256(path.read_bytes()).hexdigest()


def test_id_is_remembered_until_the_file_changes(stored, cache, monkeypatch):
    path = stored({"w": drawn(5)})
    first = SafetensorsFile(path, cache).id
    with monkeypatch.context() as patch:
        patch.setattr("merging.files.sha256", lambda path: pytest.fail("hashed again"))
        assert SafetensorsFile(path, cache).id == first
    os.utime(path, ns=(0, 0))
    assert SafetensorsFile(path, cache).id == first
    path.write_bytes(stored({"w": drawn(5, seed=1)}).read_bytes())
    assert SafetensorsFile(path, cache).id == hashlib.sha256(path.read_bytes()).hexdigest() != first


def test_id_of_a_state_dict_covers_names_dtypes_shapes_and_bytes():
    tensors = {"a": drawn(2, 3), "b": torch.arange(3)}
    same = dict(reversed(tensors.items()))
    changes = (
        {"a": drawn(3, 2)}, {"a": drawn(2, 3, seed=1)}, {"a": drawn(2, 3).half()}, {"b": torch.arange(3).int()},
        {"c": torch.zeros(0)},
    )  # fmt: skip
    ids = [StateDict(tensors | change).id for change in changes]
    assert StateDict(tensors).id == StateDict(same).id and len({StateDict(tensors).id, *ids}) == 1 + len(changes)
    assert StateDict({"a": tensors["a"].T.contiguous().T}).id == StateDict({"a": tensors["a"]}).id


def test_part_shows_the_keys_under_a_prefix(stored):
    whole = SafetensorsFile(stored({"visual.w": drawn(2), "visual.b": drawn(1), "text.w": drawn(3)}))
    part = below(whole, "visual.")
    assert part.specs().keys() == {"visual.w", "visual.b"} and part.id == whole.id and part.name == whole.name
    assert torch.equal(part.tensor("visual.w"), drawn(2))
    part.release()


def test_every_truncation_is_noticed_in_the_header(stored, tmp_path):
    content = stored({"w": drawn(4), "ids": torch.arange(3)}).read_bytes()
    for length in range(1, len(content)):
        (tmp_path / "short").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"short is not a readable safetensors file .*copy or download it again"):
            SafetensorsFile(tmp_path / "short")


def test_flipped_bytes_in_the_header_never_end_in_another_error(stored, tmp_path):
    content = bytearray(stored({"w": drawn(4), "ids": torch.arange(3)}).read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for position in range(8 + length):
        for flip in (0x01, 0x20, 0x80):
            content[position] ^= flip
            (tmp_path / "flipped").write_bytes(content)
            with contextlib.suppress(UserError):
                read(SafetensorsFile(tmp_path / "flipped"))
            content[position] ^= flip


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"), (b"garbage", "not a readable safetensors file"), (b"\xff" * 64, "of no kind that is known"),
        (b"PK\x03\x04" + bytes(100), "a pickle, as torch.save writes, not a safetensors file"),
        (b"\x80\x02}q\x00." * 20, "a pickle, as torch.save writes, not a safetensors file"),
    ],
)  # fmt: skip
def test_files_of_another_kind(tmp_path, content, what):
    (tmp_path / "other.bin").write_bytes(content)
    with pytest.raises(UserError, match=rf"other.bin is {what}"):
        SafetensorsFile(tmp_path / "other.bin")


@pytest.mark.parametrize(
    "header",
    [
        [], None, 7, {"w": 3}, {"w": {}}, {"w": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]}},
        {"w": {"dtype": "F128", "shape": [2], "data_offsets": [0, 8]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0.5, 8.5]}},
        {"w": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
    ],
)  # fmt: skip
def test_headers_that_make_no_sense(tmp_path, header):
    what = "not a readable safetensors file" if isinstance(header, dict) else "of no kind that is known"
    with pytest.raises(UserError, match=what):
        SafetensorsFile(rewritten(tmp_path / "odd", header, bytes(8)))


def test_paths_that_are_no_file(tmp_path, unwritable):
    with pytest.raises(UserError, match=r"There is no checkpoint at .*none.safetensors"):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        SafetensorsFile(tmp_path)
    with pytest.raises(UserError, match=r"Cannot read .*folder.*Not a directory"):
        SafetensorsFile(unwritable)


def test_a_view_goes_to_another_process(tmp_path):
    """Heads that are fitted on it go to the workers that train experts."""
    weights = {"model.q": drawn(3, 6), "model.k": drawn(3, 6, seed=1), "model.v": drawn(3, 6, seed=2)}
    write_safetensors(tmp_path / "a.safetensors", {k: Spec(w.shape, w.dtype) for k, w in weights.items()},
                      iter(weights.items()), {})  # fmt: skip
    stored = SafetensorsFile(tmp_path / "a.safetensors")
    pieces = pieces_of(below(stored, "model."))
    joined = join_pieces([*pieces.values()], 0)
    view = View({"joined": joined, "third": joined.third(1, 0), "turned": pieces["model.v"].turned,
                 "part": pieces["model.q"].third(2, 1)}, stored)  # fmt: skip
    again = pickle.loads(pickle.dumps(view))
    assert all(torch.equal(again.tensor(key), view.tensor(key)) for key in view.specs())
    assert again.id == view.id and torch.equal(again.tensor("turned"), weights["model.v"].T)
