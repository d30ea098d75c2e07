"""Files are taken for what they hold, whatever their ending; what is no checkpoint is named for what it is."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile

import numpy
import pytest
import torch
from safetensors.torch import save

from merging import UserError
from merging.checkpoints import SafetensorsFile
from merging.checkpoints.file_kinds import kind_of
from merging.checkpoints.opening import open_file

STATE = {"w": torch.ones(2, 3)}


def torch_file(**options):
    buffer = io.BytesIO()
    torch.save(STATE, buffer, **options)
    return buffer.getvalue()


def zipped(names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return buffer.getvalue()


def arrays():
    buffer = io.BytesIO()
    numpy.savez(buffer, w=numpy.ones(3))
    return buffer.getvalue()


def tape():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return buffer.getvalue()


def script():
    """As OpenAI publishes its CLIP."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), buffer)
    return buffer.getvalue()


READ = {
    "safetensors": save(STATE), "zip": torch_file(), "plain": pickle.dumps(STATE),
    "legacy": torch_file(_use_new_zipfile_serialization=False),
    "legacy of protocol 1": torch_file(_use_new_zipfile_serialization=False, pickle_protocol=1),
}  # fmt: skip


@pytest.mark.parametrize("name", ["expert.safetensors", "expert.pth.tar", "expert.bin", "last.ckpt", "expert"])
@pytest.mark.parametrize("form", READ)
def test_endings_are_not_believed(tmp_path, cache, form, name):
    path = tmp_path / name
    path.write_bytes(READ[form])
    assert kind_of(path) == ("safetensors" if form == "safetensors" else "pickle")
    assert torch.equal(open_file(path, cache).tensor("w"), STATE["w"])


NAMED = {
    "a git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 605247071\n",
    "a web page": b"\n<!DOCTYPE html><html><head><title>Login</title>",
    "JSON, such as a configuration": json.dumps({"model_type": "clip", "x": [1]}).encode(),
    "text that begins with": b"epoch,loss\n1,0.5\n",
    "empty": b"",
    "a TorchScript archive": script(),
    "an archive of NumPy arrays": arrays(),
    "an array of NumPy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'",
    "a GGUF file": b"GGUF\x03\x00\x00\x00" + bytes(40),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(40),
    "the index of a TensorFlow checkpoint": bytes(64) + struct.pack("<Q", 0xDB4775248B80FB57),
    "weights in msgpack": b"\x82\xa4step\x01\xa6params\x81\xa1w\xc0",
    "compressed with gzip": gzip.compress(b"content"),
    "a tar archive": tape(),
    "a zip archive with model.safetensors": zipped(["model.safetensors", "README.md"]),
    "of no kind that is known here": bytes(range(100, 180)) + b"\x00\xff\xfe",
}


@pytest.mark.parametrize("ending", [".pt", ".safetensors", ""])
@pytest.mark.parametrize("what", NAMED)
def test_what_is_no_checkpoint_is_named(tmp_path, what, ending):
    path = tmp_path / f"expert{ending}"
    path.write_bytes(NAMED[what])
    for open_it in (open_file, SafetensorsFile):
        with pytest.raises(UserError, match=rf"expert{ending} (is|holds) {what}") as told:
            open_it(path)
        assert "damaged" not in str(told.value)


def test_damaged_files_are_called_damaged(tmp_path):
    for form, content in READ.items():
        path = tmp_path / form
        path.write_bytes(content[:-5])
        with pytest.raises(UserError, match="may be truncated or damaged"):
            open_file(path)


def test_a_torchscript_archive_tells_what_works(tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    path.write_bytes(script())
    with pytest.raises(UserError, match=r"torch.jit.load\(path\).state_dict\(\), new.*experts.base=openai"):
        open_file(path)
    torch.save(torch.jit.load(path).state_dict(), tmp_path / "new")
    assert open_file(tmp_path / "new").specs().keys() == {"weight", "bias"}


def test_folders_and_missing_files_are_told(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*none"):
        open_file(tmp_path / "none")
    with pytest.raises(UserError, match=r"is a folder.*which has none"):
        open_file(tmp_path)
