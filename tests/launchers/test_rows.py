"""Rows survive the disk unchanged, and a bad one is never silent."""

import dataclasses
import math
import re

import pytest
from cells import failed_row, make_row

from launchers import rows
from merging.errors import UserError


def test_rows_come_back_in_order_of_creation(tmp_path):
    late = make_row("ties", created="2025-02-01T00:00:00+00:00")
    early, failed = make_row("average"), failed_row(created="2025-03-01T00:00:00+00:00")
    paths = [rows.write(row, tmp_path / "new" / "folder") for row in (late, failed, early)]

    assert paths[0].name == f"{late.run_id}.json"
    assert rows.read(tmp_path / "new" / "folder") == rows.read(paths) == [early, late, failed]


def test_find_knows_only_finished_rows(tmp_path):
    done, failed = make_row("ties"), failed_row()
    for row in (done, failed):
        rows.write(row, tmp_path)

    assert rows.find(tmp_path, done.run_id) == done
    assert rows.find(tmp_path, failed.run_id) is None
    assert rows.find(tmp_path / "nowhere", done.run_id) is None


def test_run_id_depends_on_content_alone():
    config, checkpoints = {"method": {"keep": 0.2}, "seed": 0}, {"base": "x", "cars": "y"}
    name = rows.run_id(config, checkpoints)

    assert len(name) == 12 and int(name, 16) >= 0
    assert name == rows.run_id(dict(reversed(config.items())), dict(reversed(checkpoints.items())))
    assert name != rows.run_id({**config, "seed": 1}, checkpoints)
    assert name != rows.run_id(config, {**checkpoints, "cars": "z"})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_row_holds_a_number_that_is_none(tmp_path, value):
    with pytest.raises(UserError, match=r"outside 0\.\.1 for cars"):
        rows.write(make_row(tasks=["cars"], accuracy={"cars": value}), tmp_path)
    with pytest.raises(UserError, match=r"config\.method\.keep is (nan|inf)"):
        rows.write(dataclasses.replace(make_row(), config={"method": {"keep": value}}), tmp_path)
    with pytest.raises(UserError, match=r"config\.keep is (nan|inf)"):
        rows.run_id({"keep": value}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:100], "delimiter|Unterminated|Expecting"),
        (lambda text: text.replace('"seed": 0', '"seed": NaN'), "NaN"),
        (lambda text: text.replace('"family"', '"famly"'), "famly"),
        (lambda text: text.replace('"status": "ok"', '"status": "done"'), "status"),
        (lambda text: text.replace('"cars": 0.61', '"cars": 61'), "accuracy outside 0..1 for cars"),
        (lambda text: "[]", "mapping"),
    ],
)
def test_a_damaged_file_is_named_and_the_others_survive(tmp_path, caplog, damage, reason):
    good, bad = make_row("average"), make_row("ties")
    rows.write(good, tmp_path)
    path = rows.write(bad, tmp_path)
    path.write_text(damage(path.read_text()))

    assert rows.read(tmp_path) == [good]
    assert str(path) in caplog.text
    assert re.search(reason, caplog.text)
    assert rows.find(tmp_path, bad.run_id) is None


def test_a_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        rows.read(tmp_path / "nowhere")
