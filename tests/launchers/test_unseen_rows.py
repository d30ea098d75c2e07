"""Rows of merges with held-out tasks: apart from the merged ones in rows, tables and what `show` tells."""

import pytest
from cells import make_row, routed_row
from console import by_method

from launchers import rows, show
from launchers.report import page, sections
from launchers.results.frame import summarise
from launchers.results.table import columns, records
from merging.errors import UserError

SEEN, UNSEEN = ["scenes", "cars"], ["signs", "digits"]
CHECKPOINTS = {name: name for name in ["base", *SEEN, *UNSEEN]}


def some_rows():
    """Two references, a static and a routed merge, an oracle."""
    splits = {task: {"name": "test", "id": task, "size": 40} for task in [*SEEN, *UNSEEN]}
    same = {"tasks": SEEN, "checkpoints": CHECKPOINTS, "splits": splits}
    routed = routed_row("duet", 0.8, **same, unseen={"signs": 0.3, "digits": 0.4})
    routed.routing["unseen"] = {"signs": [0.75, 0.25], "digits": [0.4, 0.6]}
    return [
        make_row("base", 0.5, **same, unseen={"signs": 0.1, "digits": 0.3}),
        make_row("ties", 0.6, **same, unseen={"signs": 0.25, "digits": 0.3}),
        routed,
        make_row("emr", 0.85, **same, router="oracle", unseen=dict.fromkeys(UNSEEN)),
        make_row("expert", 0.9, **same, unseen={"signs": 0.95, "digits": 0.85}),
    ]


def test_a_command_leaves_unseen_tasks_out_and_scores_them(output, duet_here):
    held = ["suite.tasks=[cars,signs,digits]", "suite.held_out=[signs]", "method=twin"]
    status, table, errors = duet_here(output, *held)
    assert status == 0, errors
    written = by_method(output)
    for row in written.values():
        assert (
            row.tasks == ["cars", "digits"] and set(row.accuracy) == {"cars", "digits"} and set(row.unseen) == {"signs"}
        )
        assert row.splits["signs"]["size"] == 25
    assert len(written["twin"].routing["unseen"]["signs"]) == 2 and "signs" not in written["twin"].routing["accuracy"]

    duet_here(output, "suite.tasks=[signs]", "method=base")
    alone = {row.method: row for row in rows.read(output / "results") if row.tasks == ["signs"]}
    assert written["base"].unseen == alone["base"].scores  # zero-shot
    assert written["expert"].unseen == alone["expert"].scores  # its own expert
    assert written["twin"].checkpoints["signs"] == alone["expert"].checkpoints["signs"]
    assert "unseen" in table and "whose experts are not merged" in " ".join(table.split())


@pytest.mark.parametrize("held", ["[dogs]", "[cars,digits]", "[cars,cars]"])
def test_a_command_that_cannot_hold_these_out_says_so(output, duet_here, held):
    status, _, errors = duet_here(output, f"suite.held_out={held}", "method=average")
    assert status == 1 and "suite.held_out" in errors and "Traceback" not in errors


def test_unseen_tasks_are_apart_from_mean_and_norm():
    (summary,) = summarise(some_rows())
    assert summary.unseen == tuple(UNSEEN) and summary.suite == "mini8 without signs, digits"
    table = {column.header: dict(zip(summary.lines["label"], column.cells, strict=True))
             for column in columns(summary)}  # fmt: skip
    assert [table["unseen"][name].text for name in ("base", "ties", "duet", "emr", "expert")] == [
        "20.0", "27.5", "35.0", "-", "90.0"]  # fmt: skip
    assert table["signs unseen"]["duet"].text == "30.0" and table["mean"]["duet"].text == "80.5"
    norm = 100 * (0.80 / 0.90 + 0.81 / 0.91) / 2
    assert table["norm"]["duet"].text == f"{norm:.1f}"
    assert records(some_rows()).set_index("method")["unseen digits"]["ties"] == 30


def test_rows_with_other_unseen_tasks_are_in_another_table():
    plain = make_row("ties", 0.7, tasks=SEEN, checkpoints={name: name for name in ["base", *SEEN]})
    assert len(summarise([*some_rows(), plain])) == 2


def test_show_and_the_report_tell_whose_parts_an_unseen_task_got(capsys, tmp_path):
    made = some_rows()
    show.explain(made[2], made, show.Console(width=160))
    told = capsys.readouterr().out
    (line,) = (line.split() for line in told.splitlines() if line.strip().startswith("signs"))
    assert line == ["signs", "30.0", "10.0", "95.0"]
    html = page(sections(summarise(made)))
    assert "signs (unseen)" in html and "whose experts are not merged" in html
    for row in made:
        rows.write(row, tmp_path)
    assert {row.method: row.unseen for row in rows.read(tmp_path)} == {row.method: row.unseen for row in made}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"unseen": {"signs": 1.5}}, r"accuracy outside 0\.\.1 for signs"),
        ({"unseen": {"cars": 0.5}}, "both merged and unseen"),
    ],
)
def test_a_row_with_impossible_unseen_scores_is_not_written(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        rows.write(make_row(tasks=SEEN, **wrong), tmp_path)
