"""Every task draws both of its looks, the same way every time."""

import itertools

import pytest
import torch

from merging.ops import generator
from tasks.mini.generate import CLASSES, MODULES, render, to_bytes

STYLES = ("web", "task")
EVERY = pytest.mark.parametrize(("task", "style"), list(itertools.product(CLASSES, STYLES)))


def drawn(task, style, count=40, chunk=1000, seed=0):
    return render(task, count, style, generator("test", seed, task, style), chunk)


@EVERY
def test_images_are_bytes_with_something_on_them(task, style):
    images, labels = drawn(task, style)

    assert images.shape == (40, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and 0 <= int(labels.min()) <= int(labels.max()) < len(CLASSES[task])
    spread = images.float().flatten(1).std(1)
    assert spread.min() > 2, f"image {int(spread.argmin())} of class {CLASSES[task][labels[spread.argmin()]]} is blank"
    assert len({image.numpy().tobytes() for image in images}) == 40


@EVERY
def test_drawing_repeats_and_follows_its_stream(task, style):
    images, labels = drawn(task, style)
    again, same_labels = drawn(task, style)
    other, _ = drawn(task, style, seed=1)

    assert torch.equal(images, again) and torch.equal(labels, same_labels)
    assert not torch.equal(images, other)


@EVERY
def test_every_class_looks_different(task, style):
    """Two images of each class from equal streams: only the class tells them apart."""
    images = [
        to_bytes(MODULES[task].draw(torch.full((2,), label), style, generator("class", task, style)))
        for label in range(len(CLASSES[task]))
    ]
    assert len({image.numpy().tobytes() for image in images}) == len(CLASSES[task])


@pytest.mark.parametrize("task", CLASSES)
def test_the_two_styles_differ(task):
    """By more than a different draw of one style: compared as mean pictures."""
    web, task_style = (drawn(task, style)[0].float().mean(0) for style in STYLES)
    assert (web - task_style).abs().mean() > 2


def test_chunks_change_the_images_but_not_the_labels():
    """Every chunk draws on from the same stream, so the chunk is part of what fixes a split."""
    whole, labels = drawn("cars", "task")
    same, _ = drawn("cars", "task", chunk=40)
    parts, chunk_labels = drawn("cars", "task", chunk=20)

    assert torch.equal(whole, same) and torch.equal(labels, chunk_labels)
    assert torch.equal(parts, drawn("cars", "task", chunk=20)[0]) and parts.shape == whole.shape


def test_bytes_are_rounded_and_clamped():
    assert to_bytes(torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
