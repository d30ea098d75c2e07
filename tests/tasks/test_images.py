"""Pixels as open_clip sees them; splits that survive a kill; bad images named."""

import copy
import io
import multiprocessing
import re
import resource
import sys
import time
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image

from merging.errors import UserError
from tasks.split import Split, gather
from tasks.vision import images as module
from tasks.vision.decode import Damaged, Encoded, decode
from tasks.vision.folders import FileTable
from tasks.vision.images import Images, ToDecode, open_split

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def noise(width, height, mode="RGB", seed=0):
    """A PIL image of any mode."""
    rng = numpy.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (max(2, height // 7), max(2, width // 7), 4), numpy.uint8), "RGBA")
    image = small.resize((width, height), Image.Resampling.BILINEAR)
    if mode == "P":
        return image.convert("RGB").quantize(64)
    return image.convert("RGB").convert(mode) if mode != "RGBA" else image


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Encoded(f"an image.{kind}", file.getvalue())


CASES = {
    "jpeg": lambda: encoded(noise(301, 257), "JPEG", quality=80),
    "jpeg grey": lambda: encoded(noise(301, 257, "L"), "JPEG"),
    "jpeg cmyk": lambda: encoded(noise(240, 310, "CMYK"), "JPEG"),
    "png": lambda: encoded(noise(230, 500), "PNG"),
    "png 1 bit": lambda: encoded(noise(230, 240, "1"), "PNG"),
    "png grey": lambda: encoded(noise(48, 48, "L"), "PNG"),
    "png palette": lambda: encoded(noise(333, 100, "P"), "PNG"),
    "png transparent palette": lambda: encoded(noise(333, 100, "P"), "PNG", transparency=3),
    "png grey with alpha": lambda: encoded(noise(90, 80, "LA"), "PNG"),
    "png with alpha": lambda: encoded(noise(301, 257, "RGBA"), "PNG"),
    "one pixel": lambda: encoded(Image.new("RGB", (1, 1), (9, 99, 199)), "PNG"),
    "very wide": lambda: encoded(noise(2000, 3), "PNG"),
    "very high": lambda: encoded(noise(5, 1500), "PNG"),
    "exact": lambda: encoded(noise(224, 224), "PNG"),
    "turned by EXIF": lambda: encoded(noise(301, 200), "JPEG", exif=turned()),
    "webp": lambda: encoded(noise(301, 257), "WEBP", lossless=True),
}


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("case", CASES)
def test_the_transform_is_open_clips(case):
    from open_clip import image_transform

    image = CASES[case]()
    theirs = image_transform(224, is_train=False, mean=MEAN, std=STD)
    with Image.open(io.BytesIO(image.content)) as opened:
        want = theirs(opened)
    ours = decode(image, 224)
    assert isinstance(ours, numpy.ndarray) and ours.dtype == numpy.uint8 and ours.shape == (3, 224, 224)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    assert torch.equal(((want * std + mean) * 255).round().to(torch.uint8), torch.from_numpy(ours))
    torch.testing.assert_close((torch.from_numpy(ours) / 255 - mean) / std, want)


def cut(content, share=0.6):
    return content[: int(share * len(content))]


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", cut(CASES["jpeg"]().content), cut(CASES["png"]().content), cut(CASES["png"]().content, 0.05)],
)
def test_damage_is_told_and_not_raised(content):
    found = decode(Encoded("here.jpg", content), 224)
    assert isinstance(found, Damaged) and found.where == "here.jpg" and found.why


def test_a_missing_file_is_damage(tmp_path):
    assert isinstance(decode(Encoded("gone", tmp_path / "gone.jpg"), 32), Damaged)


def folder_of(root, count, size=40):
    """A table of PNG files."""
    root.mkdir()
    paths = tuple(root / f"{index:03}.png" for index in range(count))
    for index, path in enumerate(paths):
        noise(size, size + index % 5, seed=index).save(path)
    return FileTable(paths, torch.arange(count) % 3, str(root))


def wanted(table, indices=None, size=32):
    indices = torch.arange(len(table.labels)) if indices is None else torch.tensor(indices)
    return ToDecode("birds", "test", table, indices, size)


def test_a_split_is_what_its_images_are(tmp_path):
    table = folder_of(tmp_path / "source", 9)
    order = [4, 0, 8, 2, 2]
    made = Images(tmp_path / "images", 2).make(wanted(table, order), "key")

    by_hand = numpy.stack([decode(Encoded("", table.paths[index]), 32) for index in order])  # type: ignore[arg-type]
    assert torch.equal(made.inputs, torch.from_numpy(by_hand)) and made.labels.tolist() == [1, 0, 2, 2, 2]
    assert made.id == Split("test", made.inputs.clone(), made.labels.clone()).id
    assert made.name == "test" and len(made) == 5


def test_a_split_is_decoded_once_and_mapped(tmp_path, monkeypatch):
    store, want = Images(tmp_path / "images"), wanted(folder_of(tmp_path / "source", 5))
    assert store.find("birds", "test", "key") is None
    first = store.make(want, "key")
    monkeypatch.setattr(module, "decode", lambda *_: pytest.fail("decoded again"))
    second, third = store.make(want, "key"), store.find("birds", "test", "key")
    assert third is not None and first.id == second.id == third.id
    third.inputs[:] = 0  # a private map
    assert torch.equal(store.make(want, "key").inputs, first.inputs) and first.inputs.any()


def test_another_key_is_another_split(tmp_path):
    store, table = Images(tmp_path / "images"), folder_of(tmp_path / "source", 6)
    ids = {store.make(wanted(table, some), str(some)).id for some in ([0, 1], [0, 2], [1, 0])}
    assert len(ids) == 3


def test_a_split_travels_as_its_path(tmp_path):
    made = Images(tmp_path / "images").make(wanted(folder_of(tmp_path / "source", 40)), "key")
    assert made.__reduce__() == (open_split, (made.folder,))
    back = copy.copy(made)  # by the same protocol
    assert back.id == made.id and torch.equal(back.inputs, made.inputs)


def test_all_damaged_images_are_named_and_the_split_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)
    table = folder_of(tmp_path / "source", 20)
    for index in (6, 7, 13, 19):
        table.paths[index].write_bytes(b"broken")
    store = Images(tmp_path / "images")
    with pytest.raises(UserError, match=r"4 of the 20 images of birds test cannot be read") as caught:
        store.make(wanted(table), "key")
    assert all(str(table.paths[index]) in str(caught.value) for index in (6, 7, 13, 19))
    assert store.find("birds", "test", "key") is None

    for index in (6, 7, 13, 19):
        noise(40, 40, seed=index).save(table.paths[index])
    fresh = Images(tmp_path / "fresh").make(wanted(table), "key")
    assert len(fresh) == 20 and store.make(wanted(table), "key").id == fresh.id


def test_at_most_ten_damaged_images_are_shown(tmp_path):
    table = folder_of(tmp_path / "source", 15)
    for path in table.paths:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"15 of the 15 .* and 5 more") as caught:
        Images(tmp_path / "images").make(wanted(table), "key")
    assert str(caught.value).count(".png") == 10


def test_space_is_checked_before_anything_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=module.MARGIN + 3071))
    monkeypatch.setattr(module, "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match=rf"need 3,072 bytes .* where {module.MARGIN + 3071:,} bytes are free"):
        Images(tmp_path / "images").make(wanted(folder_of(tmp_path / "source", 1)), "key")


def test_a_folder_that_cannot_be_written_is_one_paragraph(tmp_path, unwritable):
    with pytest.raises(UserError, match="Cannot decode birds test into"):
        Images(unwritable).make(wanted(folder_of(tmp_path / "source", 1)), "key")


@pytest.mark.parametrize("harm", ["images.bin", "labels.bin", "split.json"])
def test_a_damaged_folder_is_refused(tmp_path, harm):
    store = Images(tmp_path / "images")
    folder = store.make(wanted(folder_of(tmp_path / "source", 4)), "key").folder
    file = folder / harm
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=re.escape(f"{folder} are damaged")):
        open_split(folder)


def start(store, want):
    """Another process that decodes 4 images a block, 20 a second."""

    def slowly():
        def slow(each, size):
            time.sleep(0.05)
            return decode(each, size)

        module.BLOCK, module.decode = 4, slow
        store.make(want, "key")

    process = multiprocessing.get_context("fork").Process(target=slowly)
    process.start()
    return process


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    """SIGKILL in the middle; the rest is decoded by the next run, and the bytes are those of an undisturbed one."""
    table = folder_of(tmp_path / "source", 60)
    store, clean = Images(tmp_path / "images"), Images(tmp_path / "clean").make(wanted(table), "key")
    process = start(Images(store.folder, 1), wanted(table))
    done = store.path("birds", "test", "key").with_name(store.path("birds", "test", "key").name + ".partial") / "done"
    until = time.monotonic() + 60
    while not (done.exists() and int(done.read_text()) >= 8) and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.join()
    kept = int(done.read_text())
    assert 8 <= kept < 60
    with (done.parent / "images.bin").open("ab") as file:
        file.write(b"half a block that was not counted")
    asked = []
    real = module.decode
    monkeypatch.setattr(module, "decode", lambda each, size: asked.append(each.where) or real(each, size))
    made = store.make(wanted(table), "key")
    assert sorted(asked) == [str(path) for path in table.paths[kept:]]
    for name in ("images.bin", "labels.bin"):
        assert (made.folder / name).read_bytes() == (clean.folder / name).read_bytes()
    assert made.id == clean.id and not done.parent.exists()


def test_two_processes_do_not_decode_the_same_split(tmp_path):
    want = wanted(folder_of(tmp_path / "source", 16))
    both = [start(Images(tmp_path / "images", 1), want) for _ in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    (folder,) = (path for path in (tmp_path / "images" / "birds").iterdir() if path.is_dir())
    assert len(open_split(folder)) == 16


def test_gathering_reads_only_what_is_asked():
    splits = [
        Split("test", torch.full((count, 3, 2, 2), count, dtype=torch.uint8) + torch.arange(count)[:, None, None, None],
              torch.zeros(count)) for count in (3, 1, 5)
    ]  # fmt: skip
    whole = torch.cat([split.inputs for split in splits])
    some = torch.tensor([8, 0, 3, 2, 4, 8])
    assert torch.equal(gather(splits, some), whole[some])


def test_memory_stays_flat(tmp_path):
    """Far more decoded bytes than the process that decodes them may grow by."""
    want, store = (
        wanted(folder_of(tmp_path / "source", 4), [index % 4 for index in range(1400)], 224),
        tmp_path / "images",
    )

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    def decodes():
        before = peak()
        Images(store).make(want, "key")
        sys.exit((peak() - before) >> 20)

    process = multiprocessing.get_context("fork").Process(target=decodes)  # a peak of its own
    process.start()
    process.join(60)
    made = Images(store).find("birds", "test", "key")
    assert made is not None and made.inputs.nbytes > 210_000_000
    assert process.exitcode is not None and 0 <= process.exitcode < 130
