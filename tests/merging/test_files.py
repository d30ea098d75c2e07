"""Files are whole or absent, whatever goes wrong while they are written."""

import errno
import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from samples import family

import merging
from merging import UserError, merge
from merging.files import remove_abandoned, write_atomically, write_text
from merging.methods import TaskArithmetic

OLD = b"the old content"


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "target"
    path.write_bytes(OLD)
    return path


def assert_untouched(target):
    assert target.read_bytes() == OLD and os.listdir(target.parent) == [target.name]


def put_on_full_disk(target):
    """From here on, the temporary file that goes beside `target` lies on a device without a free byte."""
    names = []
    write_atomically(target, lambda file: (names.append(file.name), file.write(OLD)))
    Path(names[0]).symlink_to("/dev/full")


def test_replaces_and_makes_folders(target, tmp_path):
    assert write_text(target, "näu").read_text("utf-8") == "näu"
    assert write_text(tmp_path / "a" / "b" / "new", "").read_bytes() == b""
    assert os.listdir(tmp_path / "a" / "b") == ["new"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
def test_an_interrupted_write_leaves_the_old_file(target, error):
    def write(file):
        file.write(b"half of the n")
        raise error

    with pytest.raises(error):
        write_atomically(target, write)
    assert_untouched(target)


def test_an_interrupt_before_the_rename_leaves_the_old_file(target, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(target, "new")
    assert_untouched(target)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_up_late(target, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match=r"Cannot write .*target: No space left on device.* Free some space"):
        write_text(target, "new")
    assert_untouched(target)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("size", [1, 1 << 20], ids=["noticed when flushed", "noticed when written"])
def test_a_full_disk(target, size):
    put_on_full_disk(target)
    with pytest.raises(UserError, match="No space left on device"):
        write_atomically(target, lambda file: file.write(bytes(size)))
    assert_untouched(target)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_while_a_merge_is_saved(target):
    put_on_full_disk(target)
    with pytest.raises(UserError, match=r"Cannot write .*target: No space left on device"):
        merge(TaskArithmetic(), *family(2)).save(target)
    assert_untouched(target)


def test_a_folder_that_cannot_be_made(unwritable):
    with pytest.raises(UserError, match=r"Cannot write .*folder/name: .*choose a folder you may write to"):
        write_text(unwritable / "name", "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(target):
    target.parent.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        write_text(target, "new")
    target.parent.chmod(0o700)
    assert_untouched(target)


def test_a_folder_in_place_of_the_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match=r"Cannot write .*taken: Is a directory"):
        write_text(tmp_path / "taken", "new")
    assert os.listdir(tmp_path) == ["taken"]


def test_writers_of_one_file_do_not_mix(target):
    texts = [str(digit) * 50_000 for digit in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda text: write_text(target, text), texts))
    assert target.read_text() in texts and os.listdir(target.parent) == [target.name]


ABANDONING = """
import os, signal, sys, types
sys.modules["merging"] = types.ModuleType("merging")  # without the rest of the package, which takes seconds
sys.modules["merging"].__path__ = [sys.argv[2]]
from merging.files import write_atomically
def write(file):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
write_atomically(sys.argv[1], write)
"""


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(target):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", ABANDONING, target, Path(merging.__file__).parent], **pipes) as writer:
        assert writer.stdout.readline() == "writing\n"
        write_text(target, "new")
        remove_abandoned(target.parent)
        (half,) = [path for path in target.parent.iterdir() if path != target]
        assert half.read_bytes() == b"half" and str(writer.pid) in half.name
        writer.communicate("die\n")
    assert half.exists()
    write_text(target.with_name("other"), "")
    assert half.exists()  # only files of the same name are looked for
    write_text(target, "newer")
    assert not half.exists() and target.read_text() == "newer"


def test_only_names_of_its_own_are_removed(tmp_path):
    mine = [".target.1.2.bak", ".target.12", "target.1.2", ".target.x.1"]
    for name in (*mine, ".target.1.2", ".other.3.4"):
        (tmp_path / name).write_text("")
    remove_abandoned(tmp_path, "target")
    assert sorted(os.listdir(tmp_path)) == sorted([*mine, ".other.3.4"])
    remove_abandoned(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(mine)


def test_a_file_taken_for_abandoned_before_it_was_locked_is_made_anew(target, monkeypatch):
    lock, removed = fcntl.flock, []

    def late(file, operation):
        if not removed:
            removed.extend(path for path in target.parent.iterdir() if path != target)
            removed[0].unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert write_text(target, "new").read_text() == "new" and len(removed) == 1
    assert os.listdir(target.parent) == [target.name]


def test_a_file_system_without_locks(target, monkeypatch):
    """Files are written as ever, and nobody's are removed."""

    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    other = target.with_name(".target.1.2")
    other.write_text("of somebody")
    assert write_text(target, "new").read_text() == "new" and other.exists()
