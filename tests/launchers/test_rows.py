"""Rows survive the disk unchanged, and a bad one is never silent."""

import dataclasses
import itertools
import json
import math
import re

import pytest
from cells import failed_row, make_row, routed_row

from launchers import rows
from launchers.report import page, sections
from launchers.results import writers
from launchers.results.frame import summarise
from launchers.results.table import records, sheets
from merging.errors import UserError
from tasks import score


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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_row_holds_a_number_that_is_none(tmp_path, value):
    with pytest.raises(UserError, match=r"seconds\.merge: .*finite number"):
        rows.write(make_row(seconds={"merge": value}), tmp_path)
    with pytest.raises(UserError, match=r"method\.keep is (nan|inf)"):
        rows.write(dataclasses.replace(make_row(), config={"method": {"keep": value}}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_gates_and_deltas_left_behind_survives(tmp_path):
    row = routed_row(collapsed=["cars"])
    rows.write(row, tmp_path)
    assert rows.read(tmp_path) == [row]


def test_a_failure_that_tells_a_strange_path_survives(tmp_path):
    """File names need not be UTF-8."""
    row = failed_row(error="OSError: no such file: b\udcff.png")
    rows.write(row, tmp_path)
    (read,) = rows.read(tmp_path)
    assert read.error == r"OSError: no such file: b\udcff.png"


def test_a_row_of_the_first_version_still_loads(tmp_path):
    """It had shares of correct images, and at first no routing."""
    path = rows.write(make_row(tasks=["scenes", "digits"]), tmp_path)
    content = json.loads(path.read_text())
    now = rows.read(path)[0]
    for name in ("version", "overrides", "adaptation", "params", "routing", "energy", "collapsed", "search"):
        del content[name]
    content["accuracy"] = {task: score["value"] for task, score in content.pop("scores").items()}
    content["unseen"] = {"signs": 0.5, "cars": None}
    content["splits"]["signs"] = {"name": "test", "id": "signs", "size": 100}
    path.write_text(json.dumps(content))
    (row,) = rows.read(tmp_path)
    assert row.accuracy == now.accuracy and row.routing == {} and row.overrides is None and row.version == 2
    assert row.scores["digits"] == score.accuracy(305, 500)
    assert row.unseen == {"signs": score.accuracy(50, 100), "cars": None}


RIGHT = {"cars": 1.0, "signs": 0.5}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (
            {"routing": {"matrix": [[1.0, 0.0], [0.0, math.nan]], "accuracy": RIGHT}},
            r"routing\.matrix\.1\.1: .*finite number",
        ),
        ({"routing": {"matrix": [[1.0, 0.0]], "accuracy": RIGHT}}, "routing.matrix is not tasks x tasks"),
        ({"routing": {"matrix": [[1.0, 0.0], [1.0]], "accuracy": RIGHT}}, "routing.matrix is not tasks x tasks"),
        ({"routing": {"accuracy": RIGHT}}, "routing.matrix is not tasks x tasks"),
        ({"routing": {"matrix": [[1.0, 0.0], [0.0, 1.0]], "accuracy": {"cars": 1.0}}}, "not one number a task"),
        (
            {"routing": {"matrix": [[1.0, 0.0], [0.0, 1.0]], "accuracy": RIGHT | {"cars": 1.5}}},
            r"routing\.accuracy\.cars: .* less than or equal to 1",
        ),
        ({"energy": {"proj": [0.5, math.inf]}}, r"energy\.proj\.1: .*finite number"),
        ({"energy": {"proj": 0.5}}, r"energy\.proj: .*valid array"),
        ({"collapsed": "cars"}, "collapsed: .*valid array"),
        ({"similarity": [[1.0, 0.5], [0.5]]}, "similarity is not tasks x tasks"),
        ({"similarity": [[1.0, 0.5], [0.5, math.nan]]}, r"similarity\.1\.1: .*finite number"),
        ({"search": {"criterion": "norm", "scales": [], "scored": 0}}, "search.scales: .* at least 1 item"),
        (
            {"search": {"criterion": "norm", "scales": [0.1], "scored": None}},
            "search.scored: .*valid integer",
        ),
        ({"search": {"criterion": "norm"}}, "search lacks scales, scored"),
    ],
)
def test_no_row_holds_routing_that_is_none(tmp_path, wrong, reason):
    with pytest.raises(UserError, match=reason):
        rows.write(routed_row(**({"tasks": ["cars", "signs"]} | wrong)), tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:100], r"EOF while parsing .* at line \d+ column \d+"),
        (lambda text: "", "EOF while parsing a value at line 1 column 0"),
        (lambda text: text.replace('"seed": 0', '"seed": NaN', 1), r"expected value at line 7 column 11"),
        (lambda text: text.replace('"ties"', '"NaN", "x": -Infinity', 1), r"invalid number at line 4 column 2\d"),
        (lambda text: text.replace('"family"', '"famly": 1, "family"'), "famly: Unexpected keyword argument"),
        (lambda text: re.sub(r' "family".*\n', "", text), "family: Field required"),
        (lambda text: text.replace('"status": "ok"', '"status": "done"'), "status: .*'ok' or 'error'"),
        (lambda text: text.replace('"value": 0.61', '"value": 61'), r"accuracy outside 0\.\.1 for cars"),
        (lambda text: text.replace('"value": 0.61', '"value": true'), "scores.cars.value: .*valid number"),
        (
            lambda text: text.replace('"merge": 0.42', '"merge": "0.42"'),
            "seconds.merge: .*valid number",
        ),
        (lambda text: text.replace('"macs": 10000000', '"macs": "many"'), "macs: .*valid integer"),
        (lambda text: text.replace('"scale": 0.3', '"scale": 1e999'), "scale: .*finite number"),
        (
            lambda text: text.replace('"base": "bbbbbbbb"', '"base": 5'),
            "checkpoints.base: .*valid string",
        ),
        (lambda text: "[]", "Input should be an object"),
        (lambda text: "[" * 200_000, "recursion limit"),
        (lambda text: text.replace('"mini8"', '"mini\udcff"', 1), "invalid unicode code point at line 6 column 17"),
    ],
)
def test_a_damaged_file_is_named_and_the_others_survive(tmp_path, caplog, damage, reason):
    """By file, and the place in it."""
    good, bad = make_row("average"), make_row("ties")
    rows.write(good, tmp_path)
    path = rows.write(bad, tmp_path)
    path.write_bytes(damage(path.read_text()).encode(errors="surrogateescape"))

    assert rows.read(tmp_path) == [good]
    (message,) = caplog.messages
    assert message.startswith(f"skipped the damaged row file {path}: ") and re.search(reason, message), message
    assert rows.find(tmp_path, bad.run_id) is None


WRONG = (None, True, -1, 0.5, "text", [], [[]], ["a", 1], {}, {"a": []}, {"cars": "x"}, 10**30, 1e999)


def test_no_wrong_type_gets_as_far_as_a_table(tmp_path):
    """Each value of a row is replaced by each of many wrong ones: the row is refused, or every table can be made."""
    row = routed_row(tasks=["cars", "signs"], validation={"cars": 0.5, "signs": 0.5})
    path = rows.write(row, tmp_path)
    whole, refused, accepted = json.loads(path.read_text()), 0, 0
    places = [(key,) for key in whole] + [(key, inner) for key, value in whole.items() if isinstance(value, dict)
                                          for inner in value]  # fmt: skip
    for place, wrong in itertools.product(places, WRONG):
        content = json.loads(json.dumps(whole))
        (content if len(place) == 1 else content[place[0]])[place[-1]] = wrong
        path.write_text(json.dumps(content))
        made = rows.read(tmp_path)
        refused += not made
        assert all(write(sheets(made)) is not None for write in writers.FORMATS.values()), (place, wrong)
        assert writers.comma_separated(records(made)), (place, wrong)
        if made and (accepted := accepted + 1) % 15 == 0:
            page(sections(summarise(made)))  # takes its time
    assert refused > len(places) * len(WRONG) / 2


def test_a_path_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        rows.read(tmp_path / "nowhere")
