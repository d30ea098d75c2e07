"""Hostile and broken pickles: nothing in them runs, no memory is taken for what they claim, and they are refused."""

import io
import os
import random
import struct
import subprocess
import zipfile

import pytest
import torch
from clips import inert_state, whole, write_encoder

from merging.errors import UserError


class Attack:
    """Pickled, it calls something."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.fixture
def trap(tmp_path):
    """A file that must never appear, and the command that would make it."""
    path = tmp_path / "sprung"
    return path, f"touch {path}"


def attacks(path, command):
    yield Attack(os.system, command)
    yield Attack(eval, f"open({str(path)!r}, 'w')")
    yield Attack(exec, f"open({str(path)!r}, 'w')")
    yield Attack(subprocess.check_call, ["touch", str(path)])
    yield Attack(getattr, Attack(__import__, "os"), "system")
    yield Attack(vars(torch)["load"], str(path))
    yield Attack(torch.hub.load, "owner/name", "model")
    yield Attack(torch.storage._load_from_bytes, inner(Attack(os.system, command)))
    yield Attack(torch._utils._rebuild_parameter, Attack(os.system, command), True, {})


def inner(value):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_nothing_in_a_file_runs(tmp_path, trap, form):
    for number, attack in enumerate(attacks(*trap)):
        state = {"weight": torch.ones(2), "extra": attack}
        path = tmp_path / "file.pt"
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
        try:
            assert torch.equal(inert_state(path)["weight"], torch.ones(2))
        except UserError as error:
            assert str(path) in str(error)
        assert not trap[0].exists(), number


HOSTILE = {
    "system": b"cos\nsystem\n(S'{command}'\ntR.",
    "posix": b"cposix\nsystem\n(S'{command}'\ntR.",
    "eval": b'c__builtin__\neval\n(S\'open("{path}","w")\'\ntR.',
    "inst": b"(S'{command}'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'{command}'\no.",
    "newobj": b"\x80\x02cos\nsystem\n(S'{command}'\nt\x81.",
    "named on the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93(S'{command}'\ntR.",
    "built": b"\x80\x02cos\nsystem\n)\x81}S'__setstate__'\ncos\nsystem\nsbS'{command}'\nb.",
    "dotted": b"\x80\x04\x8c\x05torch\x8c\x0fos.path.system.x\x93(S'{command}'\ntR.",
    "shadowed": b"ccollections\nOrderedDict\n(cos\nsystem\n(S'{command}'\ntRtR.",
    "storage": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(cos\nsystem\n(S'{command}'\ntRK\x00)) \x89}tR.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_opcodes_are_shells_or_refused(tmp_path, trap, name):
    path, command = trap
    content = HOSTILE[name].replace(b"{command}", command.encode()).replace(b"{path}", str(path).encode())
    for suffix, file in (("pkl", content), ("pt", zipped(content))):
        target = tmp_path / f"hostile.{suffix}"
        target.write_bytes(file)
        with pytest.raises(UserError, match=r"hostile\." + suffix):
            inert_state(target)
        assert not path.exists()


def zipped(pickled, records=(), compression=zipfile.ZIP_STORED):
    """An archive as torch.save makes it, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, content in records:
            archive.writestr(f"archive/data/{key}", content)
    return buffer.getvalue()


def prefixed(content):
    return struct.pack("<I", len(content)) + content


def claiming(offset, shape, stride, count=4):
    """A state dict with one tensor that says this of itself."""
    numbers = lambda values: b"(" + b"".join(b"L%dL\n" % value for value in values) + b"t"  # noqa: E731
    return (
        b"}S'weight'\nctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\n"
        + b"L%dL\ntQ" % count + b"L%dL\n" % offset + numbers(shape) + numbers(stride) + b"I00\n}tRs."
    )  # fmt: skip


CONTENT = struct.pack("<4f", 1, 2, 3, 4)


def test_a_tensor_is_a_window_of_its_storage(tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(zipped(claiming(1, (1, 3), (3, 1)), [("0", CONTENT)]))
    assert torch.equal(inert_state(path)["weight"], torch.tensor([[2.0, 3.0, 4.0]]))


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "count"),
    [
        (0, (5,), (1,), 4), (1, (4,), (1,), 4), (-1, (2,), (1,), 4), (0, (-2,), (1,), 4), (3, (2,), (-1,), 4),
        (0, (2, 2), (1,), 4), (0, (10**15,), (1,), 10**15), (0, (10**15,), (0,), 4), (0, (2**70,), (0,), 4),
        (0, (4,), (1,), 2**70), (0, (4,), (1,), -4), (0, (2**33, 2**33), (0, 0), 4),
        (0, (2**40, 2**40, 0), (1, 1, 1), 4),
    ],
)  # fmt: skip
def test_impossible_tensors_are_refused_before_memory_is_taken(tmp_path, offset, shape, stride, count):
    path = tmp_path / "file.pt"
    path.write_bytes(zipped(claiming(offset, shape, stride, count), [("0", CONTENT)]))
    with pytest.raises(UserError, match=r"file\.pt"):
        inert_state(path)


@pytest.mark.parametrize(
    "content",
    {
        "deep lists": b"(" * 100_000 + b"l" * 100_000 + b".",
        "key that hashes for ever": b"\x80\x02" + b")q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"}h\x00K\x01s.",
        "set of the same": b"c__builtin__\nset\n(]" + b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"h\x00atR.",
        "huge number": b"I" + b"9" * 10_000 + b"\n.",
        "huge string": b"\x8d" + b"\xff" * 7 + b"\x7f" + b"x.",
        "extension": b"\x82\x01.",
        "nothing on the stack": b"R.",
        "no mark": b"t.",
        "number": b"K\x01.",
        "no pickle": b"hello, world\n",
        "empty": b"",
        "archive in bytes": b"ctorch.storage\n_load_from_bytes\n(B" + prefixed(zipped(b"N.")) + b"tR.",
        "TorchScript": zipped(b"N.", [("../constants.pkl", b"N.")]).replace(b"data/../constants", b"constants"),
        "compressed": zipped(b"N." * 1000, compression=zipfile.ZIP_DEFLATED),
        "state without names": b"}K\x01K\x02s.",
    }.items(),
    ids=lambda pair: pair[0],
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused_at_once(tmp_path, content):
    path = tmp_path / "file.pt"
    path.write_bytes(content[1])
    with pytest.raises(UserError, match=r"file\.pt"):
        inert_state(path)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("form", ["legacy", "plain"])
def test_damaged_bytes_raise_nothing_else(tmp_path, form):
    """A few bytes of the instructions changed at random: tensors or a UserError, and soon."""
    content = write_encoder(tmp_path / "whole.pt", whole(words=5), form).read_bytes()
    names = [place for place in range(len(content)) if content[place : place + 6] in (b"torch.", b"_modul", b"weight")]
    chance, path = random.Random(0), tmp_path / "file.pt"
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 2, 5))):
            damaged[min(len(damaged) - 1, max(0, chance.choice(names) + chance.randint(-60, 60)))] = chance.randrange(
                256
            )
        path.write_bytes(damaged)
        try:
            assert inert_state(path)
        except UserError as error:
            assert str(path) in str(error)
