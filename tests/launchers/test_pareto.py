"""The two objectives of a search, and the Pareto front."""

from itertools import combinations

import numpy as np
import pytest
from cells import failed_row, make_row, routed_row
from matplotlib.image import imread
from pandas import DataFrame

from launchers import rows
from launchers.pareto import Point, main, objectives
from launchers.report import sections
from launchers.results.curves import search_figures
from launchers.results.frame import pareto, summarise
from launchers.results.plot import declared, drawings
from launchers.table import main as table

TASKS = ["cars", "signs"]


def test_the_objectives_are_those_of_the_first_file(tmp_path):
    row, expert, base = make_row("ties", 0.4, stored_bytes=777), make_row("expert", 0.8), make_row("base", 0.1)
    files = [rows.write(written, tmp_path) for written in (row, expert, base)]
    norm = sum(row.accuracy[task] / expert.accuracy[task] for task in row.tasks) / len(row.tasks)
    assert objectives(files) == (pytest.approx(norm), 777.0)
    assert objectives([files[1], *files])[0] == 1
    assert objectives([files[0]]) == (pytest.approx(0.435), 777.0)  # no expert: plain accuracy


def test_without_a_finished_row_there_are_none(tmp_path):
    expert, failed = rows.write(make_row("expert", 0.8), tmp_path), rows.write(failed_row(), tmp_path)
    assert objectives([failed, expert]) is None and objectives([]) is None
    assert objectives([tmp_path / "missing.json", expert]) is None


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_beats(seed):
    import random

    draw = random.Random(seed)
    points = [Point(draw.randrange(6), draw.randrange(6)) for _ in range(12)]
    kept = [Point(*values) for values in pareto(DataFrame(points), "stored_bytes", "score").to_numpy()]
    unbeaten = {point for point in points if not any(
        (other.score >= point.score and other.stored_bytes <= point.stored_bytes) and other != point
        for other in points
    )}  # fmt: skip
    assert len(kept) == len(set(kept)) and set(kept) == unbeaten
    assert kept == sorted(kept, key=lambda point: point.stored_bytes)


def test_the_picture_and_the_list_leave_out_what_is_told_the_true_task(tmp_path, capsys):
    made = [
        make_row("expert", 0.9),
        make_row("ties", 0.5, stored_bytes=10_000_000),
        routed_row("duet", 0.7, stored_bytes=15_000_000),
        routed_row("twin", 0.6, stored_bytes=20_000_000),
        make_row("emr", 0.85, router="oracle", stored_bytes=11_000_000),
        failed_row(),
    ]
    for row in made:
        rows.write(row, tmp_path / "results")
    picture = tmp_path / "pareto.png"
    main([str(tmp_path / "results"), "--file", str(picture)])

    _, *listed = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in listed] == ["ties", "duet"] and "10.0 MB" in listed[0]
    assert imread(picture).shape[1] > 1000
    rows.write(failed_row(), tmp_path / "failed")
    with pytest.raises(SystemExit, match="nothing to draw"):
        main([str(tmp_path / "failed"), "--file", str(picture)])
    with pytest.raises(SystemExit, match="No result rows"):
        main([str(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"front\.xyz names no format of a picture\. End it in one of .*\.png, .*\.svg"
    ):
        main([str(tmp_path / "results"), "--file", "front.xyz"])


FIELD = [
    make_row("expert", 0.9),
    make_row("reg_mean", 0.4, needs="inputs", seconds={"merge": 9.0}),
    make_row("fisher", 0.3, needs="labels", seconds={"merge": 5.0}),
    make_row("ties", 0.6, seconds={"merge": 2.0}),
    make_row("average", 0.7, seconds={"merge": 3.0}),
    routed_row("duet", 0.5, needs="inputs", macs=2 * 10**7, stored_bytes=20_000_000),
    routed_row("smile", 0.8, needs="nothing", macs=3 * 10**7, stored_bytes=30_000_000),
]


def test_lines_may_be_sorted_by_what_methods_need(tmp_path, capsys):
    for row in FIELD:
        rows.write(row, tmp_path)
    (plain,), (sorted_,) = summarise(FIELD), summarise(FIELD, by_needs=True)
    assert list(plain.lines["label"]) == ["fisher", "reg_mean", "ties", "average", "duet", "smile", "expert"]
    assert list(sorted_.lines["label"]) == ["ties", "average", "reg_mean", "fisher", "smile", "duet", "expert"]
    table([str(tmp_path), "--sort", "needs", "--format", "markdown"])
    shown = capsys.readouterr().out
    assert shown.index("average") < shown.index("fisher") < shown.index("smile") < shown.index("duet")


def test_scores_are_drawn_against_every_cost():
    plot = declared({"kind": "pareto", "costs": ["bytes", "macs", "seconds"]}, "here")
    (summary,) = summarise(FIELD)
    drawn = drawings(plot, "field", [summary])
    assert [figure.name for figure in drawn] == ["bytes", "macs", "seconds"]
    assert ["seconds" in figure.figure.axes[0].get_xlabel() for figure in drawn] == [False, False, True]
    assert [list(summary.front(cost)["label"]) for cost in ("stored_bytes", "macs", "ready_seconds")] == [
        ["average", "smile"], ["average", "smile"], ["ties", "average", "smile"],
    ]  # fmt: skip
    assert [figure.name for figure in drawings(plot, "field", summarise(FIELD[:5]))] == ["bytes", "seconds"]


def test_gates_are_trained_before_a_merge_is_ready():
    gated = routed_row("duet", 0.7, seconds={"merge": 1.0, "router": 3.0, "score": 9.0})
    lines = summarise([gated, make_row("ties", 0.5, seconds={"merge": 2.0, "search": 5.0})])[0].lines
    assert dict(zip(lines["label"], lines["ready_seconds"], strict=True)) == {"ties": 2.0, "duet": 4.0}


def test_merges_are_drawn_by_norm_beside_a_line_that_has_none():
    probe = make_row("linear_probe", 0.9, checkpoints={"base": "other"})
    made = [*FIELD, probe]
    (summary,) = summarise(made)
    assert summary.level == "mean" and summary.merges_level == "norm"
    (drawing,) = drawings(declared({"kind": "pareto"}, "here"), "field", [summary])
    assert drawing.figure.axes[0].get_ylabel().startswith("norm")


def test_many_methods_have_the_colours_of_their_kinds():
    rows = [make_row(f"m{number}", 0.3 + number / 100, stored_bytes=10**6 * (number + 1)) for number in range(25)]
    (drawing,) = drawings(declared({"kind": "pareto"}, "here"), "field", summarise([*rows, routed_row("twin", 0.7)]))
    names = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert names == ["Pareto front", "static", "routed"]
    written = drawing.figure.axes[0].texts
    boxes = [text.get_window_extent() for text in written]
    assert written[0].get_text() == "twin" and len(written) > 1  # the best first, the others where there is room
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_the_front_that_a_method_searched_is_drawn():
    scores = [dict(zip(TASKS, (0.4 + step, 0.9 - step / 2), strict=True)) for step in (0.0, 0.1, 0.3)]
    stored = [{"scores": some, "storage": share} for some, share in zip(scores, (0.5, 0.6, 1.0), strict=True)]
    made = [
        make_row("recombination", 0.7, TASKS, front=stored),
        make_row("map", 0.6, TASKS, front=[{"scores": some} for some in scores]),
        make_row("ties", 0.5, TASKS),
        make_row("single", 0.4, TASKS, front=stored[:1]),
    ]
    (summary,) = summarise(made)
    by_tasks, by_storage = search_figures(summary)
    assert "map found: 3 points" in by_tasks.title and "recombination found: 3 points" in by_storage.title
    (ax,) = by_storage.figure.axes
    assert ax.lines[-1].get_xydata().tolist() == pytest.approx(np.array([[50, 65.0], [60, 67.5], [100, 72.5]]))
    curves = [line.get_ydata().tolist() for line in by_tasks.figure.axes[0].lines]
    assert curves == pytest.approx(np.array([[40, 90], [50, 85], [70, 75]]))
    (section,) = sections([summary])
    names = [drawing.name for drawing in section.figures["Trade-offs"]]
    assert {by_tasks.name, by_storage.name} <= {*names} and len({*names}) == len(names)
