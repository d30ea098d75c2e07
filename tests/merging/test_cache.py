"""The cache may lose entries at any time and never gives a wrong one."""

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest
import torch
from samples import drawn, equal

from merging import Cache, UserError
from merging.cache import key_of
from merging.files import write_atomically

VALUE = {"u": drawn(3, 4), "s": drawn(3).half(), "n": torch.tensor(7)}


def never():
    pytest.fail("made again")


def entries(cache):
    return [path for path in cache.folder.rglob("*") if path.is_file()]


def test_makes_once_and_gives_the_same_bits(cache):
    for make in (lambda: VALUE, never):
        assert equal(cache.tensors("key", make), VALUE)
    assert cache.text("other", lambda: "tëxt") == cache.text("other", never) == "tëxt"
    assert equal(Cache(cache.folder).tensors("key", never), VALUE) and cache.get("absent") is None


def test_views_are_stored_as_they_look(cache):
    matrix = drawn(4, 6)
    made = cache.tensors("key", lambda: {"view": matrix.T[1:3]})
    assert equal(made, cache.tensors("key", never)) and torch.equal(made["view"], matrix.T[1:3])


@pytest.mark.parametrize("position", [0, 7, 8, 20, -1])
def test_a_flipped_byte_is_noticed_and_made_again(cache, position):
    cache.tensors("key", lambda: VALUE)
    content = bytearray(cache.path("key").read_bytes())
    content[position] ^= 4
    cache.path("key").write_bytes(content)
    assert cache.get("key") is None and not entries(cache)
    assert equal(cache.tensors("key", lambda: VALUE), VALUE) and equal(cache.tensors("key", never), VALUE)


@pytest.mark.parametrize("length", [0, 1, 8, 9, 50, -1])
def test_a_truncated_entry_is_made_again(cache, length):
    cache.tensors("key", lambda: VALUE)
    cache.path("key").write_bytes(cache.path("key").read_bytes()[:length])
    assert equal(cache.tensors("key", lambda: VALUE), VALUE)


def test_keys_are_kept_apart():
    keys = [
        key_of("svd", "code", "w", 1),
        key_of("svd", "code", "w", 2),
        key_of("svd", "code", "w", [1]),
        key_of("svd", "code", "w", "1"),
        key_of("svd", "code w", 1),
        key_of("svd", "newer code", "w", 1),
    ]
    assert len({Cache("folder").path(key) for key in keys}) == len(keys)
    assert key_of("a", "code", {"a": 1, "b": 2}) == key_of("a", "code", {"b": 2, "a": 1})


def test_the_least_recently_used_make_room(tmp_path):
    """Ten entries of 1008 bytes, read in another order than written; a cap of 5000 keeps the five used last."""
    roomy = Cache(tmp_path)
    for number in range(10):
        roomy.put(str(number), bytes(1000))
        os.utime(roomy.path(str(number)), (number, number))
    assert roomy.get("2") == roomy.get("0") == bytes(1000)
    capped = Cache(tmp_path, cap_bytes=5000)
    capped.put("new", bytes(900))
    kept = {key for key in [*map(str, range(10)), "new"] if capped.path(key).exists()}
    assert kept == {"0", "2", "8", "9", "new"} and sum(path.stat().st_size for path in entries(capped)) <= 5000


def test_stays_near_its_cap_while_it_fills(tmp_path):
    cache = Cache(tmp_path, cap_bytes=16_000)
    for number in range(60):
        cache.put(str(number), bytes(992))
        assert (
            sum(path.stat().st_size for path in entries(cache)) <= 16_000 + 2000
        )  # the folder is measured now and then
    assert cache.get("59") is not None and cache.get("0") is None


def test_an_interrupted_write_leaves_no_entry(cache, monkeypatch):
    def interrupted(path, write, durable):
        def part(file):
            write(file)
            raise KeyboardInterrupt

        write_atomically(path, part, durable)

    monkeypatch.setattr("merging.cache.write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.tensors("key", lambda: VALUE)
    assert not entries(cache)


def test_a_failed_make_leaves_no_entry(cache):
    with pytest.raises(ZeroDivisionError):
        cache.text("key", lambda: str(1 / 0))
    assert not entries(cache) and cache.text("key", lambda: "made") == "made"


def test_threads_may_share_it(cache):
    def use():
        for number in range(30):
            cache.put(str(number % 5), bytes(100) + str(number % 5).encode())
            stored = cache.get(str(number % 5))
            wrong.extend([] if stored is None or stored == bytes(100) + str(number % 5).encode() else [number])

    wrong, threads = [], [threading.Thread(target=use) for _ in range(4)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert not wrong and len(entries(cache)) == 5


def test_an_unwritable_folder_is_a_user_error(unwritable):
    with pytest.raises(UserError, match=r"Cannot write .*folder.*choose a folder you may write to"):
        Cache(unwritable).text("key", lambda: "value")


def test_files_of_killed_writers_make_room_first(tmp_path):
    """What is being written just now is no entry, however full the cache is."""
    cache = Cache(tmp_path, cap_bytes=3000)
    cache.put("old", bytes(1000))
    folder = cache.path("old").parent
    abandoned, living = folder / ".entry.1.2", folder / ".entry.1.3"
    abandoned.write_bytes(bytes(1000))
    with living.open("wb") as file:
        file.write(bytes(1_000_000))
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        Cache(tmp_path, cap_bytes=3000).put("new", bytes(1000))
    assert living.exists() and not abandoned.exists()
    assert cache.get("old") is not None and cache.get("new") is not None


def test_entries_of_somebody_else_stop_nothing(tmp_path, monkeypatch):
    """In a shared folder one may not remove everything."""
    cache = Cache(tmp_path, cap_bytes=1500)
    cache.put("old", bytes(1000))
    os.utime(cache.path("old"), (0, 0))
    kept, unlink = cache.path("old"), Path.unlink

    def guarded(path, missing_ok=False):
        if path == kept:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", guarded)
    Cache(tmp_path, cap_bytes=1500).put("new", bytes(1000))
    assert kept.exists() and not cache.path("new").exists()  # the next in line made room


def test_a_reader_removes_what_killed_writers_left(cache):
    """Another process may have stored the entry meanwhile, so that nobody writes it again."""
    cache.put("key", b"value")
    half = cache.path("key").with_name(f".{cache.path('key').name}.1.2")
    half.write_bytes(b"half")
    assert Cache(cache.folder).get("key") == b"value" and not half.exists()
