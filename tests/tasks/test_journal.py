"""A run that was killed goes on where it stopped and ends with the same bits."""

from dataclasses import replace

import pytest
import small
import torch
from torch import nn
from torch.nn import functional

from merging.routing.gates import answered
from tasks.engine import Engine
from tasks.evaluate import outcome
from tasks.journal import Journal

ENGINE = Engine("cpu", batch=5)  # 24 images: four whole batches and one of four


class Killed(BaseException):
    """What no handler catches."""


class Tower(nn.Module):
    """Gated features of an image, until a batch is deadly."""

    def __init__(self, deadly=None):
        super().__init__()
        self.plain, self.deadly, self.seen = small.TOWER.build(), deadly, []
        self.plain.load_state_dict(small.tower_state())

    def forward(self, images):
        if len(self.seen) == self.deadly:
            raise Killed
        self.seen.append(len(images))
        answered(functional.softmax(images.mean((2, 3)), -1))
        return self.plain(images)


@pytest.fixture
def task():
    return small.Colours("hues")


def scored(tower, task, journal):
    page = journal.page(task.name, "test", ENGINE.batch)
    return outcome(tower, small.TOWER, task, "test", ENGINE, page)


def same(first, second):
    return first.score == second.score and torch.equal(first.weights, second.weights)


@pytest.mark.parametrize("deadly", [0, 1, 3, 4])
def test_only_what_is_missing_is_scored_again(task, tmp_path, deadly):
    whole = scored(Tower(), task, Journal())
    with pytest.raises(Killed):
        scored(Tower(deadly), task, Journal(tmp_path, seconds=0))
    again = Tower()
    assert same(scored(again, task, Journal(tmp_path, seconds=0)), whole)
    assert again.seen == [5, 5, 5, 5, 4][deadly:]
    last = Tower()
    assert same(scored(last, task, Journal(tmp_path)), whole) and last.seen == []


def test_batches_are_stored_from_time_to_time(task, tmp_path, monkeypatch):
    now = iter(range(0, 10_000, 12))
    monkeypatch.setattr("tasks.journal.time.monotonic", lambda: next(now))
    with pytest.raises(Killed):
        scored(Tower(4), task, Journal(tmp_path, seconds=30))
    again = Tower()
    scored(again, task, Journal(tmp_path))
    assert again.seen == [5, 4] or again.seen == [5, 5, 4]  # half a minute was lost, no more


def test_other_facts_and_damaged_pages_are_not_used(task, tmp_path):
    with pytest.raises(Killed):
        scored(Tower(2), task, Journal(tmp_path, "code", seconds=0))
    other = Tower()
    scored(other, task, Journal(tmp_path, "newer code", seconds=0))
    assert sum(other.seen) == 24
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-3])
    damaged = Tower()
    scored(damaged, task, Journal(tmp_path, "code", seconds=0))
    assert sum(damaged.seen) == 24


def test_what_was_made_is_kept_until_the_row_is_written(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"gate": torch.arange(3.0)}

    for _ in range(2):
        assert torch.equal(Journal(tmp_path / "cell").tensors("gates", make)["gate"], torch.arange(3.0))
    assert len(made) == 1
    Journal(tmp_path / "cell").close()
    Journal(tmp_path / "cell").close()  # nothing there is fine
    assert not (tmp_path / "cell").exists()
    Journal().tensors("gates", make)
    assert len(made) == 2


def test_a_split_without_images_is_scored_as_nothing(task):
    split = task.split("test")
    page = Journal().page()
    for images in ENGINE.stream(split.inputs[:0]):
        page.add({"predicted": torch.zeros(len(images))})
    assert page.done == 0 and page.together() == {}
    assert replace(ENGINE, batch=7) != ENGINE
