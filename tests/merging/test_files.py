"""Files are whole or absent, whatever goes wrong while they are written."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from samples import family

from merging import UserError, merge
from merging.files import write_atomically, write_text
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
