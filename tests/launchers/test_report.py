"""The page holds what the rows hold, all by itself."""

import re
import statistics
from dataclasses import replace

import pages
import pytest
from cells import TASKS, failed_row, make_row, routed_row
from pages import KNOBS, SCRIPT, many_rows
from PIL import Image

from launchers import report, rows
from launchers.columns import columns
from launchers.notes import notes
from launchers.report_curves import Point, curves, pareto
from launchers.report_maps import energy_map
from launchers.report_tasks import by_count
from launchers.summary import summarise


@pytest.fixture(scope="module")
def made():
    return report.sections(many_rows())


@pytest.fixture(scope="module")
def text(made):
    return report.page(made)


@pytest.fixture(scope="module")
def tree(text):
    return pages.read(text)


def test_the_page_is_whole_and_needs_nothing_else(text, tree):
    ids = [node.attributes["id"] for node in tree.all("*") if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in tree.all("*"):
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            target = node.attributes.get(name, "#")
            assert target.startswith(("#", "data:")), target
            assert not target.startswith("#") or target == "#" or target[1:] in ids, target
        assert not [name for name in node.attributes if name.startswith("on")]
    assert not {node.tag for node in tree.all("*")} & {"link", "iframe", "object", "embed"}
    clips = re.findall(r"url\((?!#)", text)
    assert not clips and set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)
    assert set(re.findall(r"https?://[^\"' <]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    (policy,) = tree.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy.attributes["content"]
    assert "nan" not in re.sub(r"[\w-]{4,}", "", " ".join(node.text for node in tree.all("td")).lower())


def test_the_table_has_the_lines_and_numbers_of_the_terminal(made, tree):
    (summary,) = (section.summary for section in made)
    (table,) = tree.all("table", kind="summary")
    (head,) = next(table.all("thead")).all("tr")
    headers = [cell.text for cell in head.all("th")]
    lines = [list(line.all("*"))[:] for line in next(table.all("tbody")).all("tr")]
    shown = [[cell for cell in line if cell.tag in ("td", "th")] for line in lines]

    assert [cells[1].text for cells in shown] == [line.label if not line.failed else
        f"{line.label} ValueError: {SCRIPT} rank 0" for line in summary.lines]  # fmt: skip
    assert {"kind", "needs", "router", "granularity", "MB", "MMACs", "MACs", "norm", "mean", "total s"} <= set(headers)
    for column in columns(summary)[1:]:
        found = [cells[headers.index(column.header)] for cells in shown]
        assert [cell.text for cell in found] == [f"{cell.text} {cell.deviation}".strip() for cell in column.cells]
        bold = [bool(list(cell.all("strong", kind="best"))) for cell in found]
        assert bold == [cell.bold for cell in column.cells], column.header
    listed = [item.text for item in next(tree.all("ul", kind="notes")).all("li")]
    assert listed == [" ".join(note.split()) for note in notes(summary)]


def test_a_failure_is_shown_whole_and_never_runs(text, tree):
    (error,) = tree.all("pre", kind="error")
    assert error.text == f"ValueError: {SCRIPT} rank 0 at line 3"
    assert SCRIPT not in text and len(list(tree.all("script"))) == 1
    assert any("1 of 12 lines failed: tsv_m" in node.text for node in tree.all("div", kind="warning"))


def test_mixed_origins_are_warned_of_and_uniform_ones_are_not():
    def warned(*some):
        page = pages.read(report.page(report.sections(some)))
        return " ".join(node.text for node in page.all("div", kind="warning"))

    one, other = make_row("ties"), make_row("average")
    assert warned(one, other) == ""
    assert "2 code versions: 1a2b3c4, ffff" in warned(one, replace(other, code="ffff"))
    assert "2 families: hub_a, mini8" in warned(one, replace(other, family="hub_a"))
    cars = {**other.splits, "cars": {"name": "test", "id": "new", "size": 500}}
    assert "different splits of cars" in warned(one, replace(other, splits=cars))
    assert "collapse in duet" in warned(one, routed_row("duet", collapsed=["cars"]))


def test_provenance_names_every_run_checkpoint_and_split(tree):
    page = tree.text
    for row in many_rows():
        assert row.run_id in page and row.code in page
        for name, content in [*row.checkpoints.items(), *((task, row.splits[task]["id"]) for task in TASKS)]:
            assert name in page and content in page


def test_a_curve_joins_the_lines_that_differ_in_one_number():
    twin = [routed_row("twin", 0.8, knobs={"rank": 4, "init": 0.5})]  # differs in another knob too: no curve
    flags = [make_row("dare", level, knobs={"flag": flag}) for flag, level in ((True, 0.5), (False, 0.6))]
    (summary,) = summarise([*many_rows(), *twin, *flags])
    found = curves(summary)

    assert list(found) == ["method.rank"] and len(found["method.rank"]) == 1
    (run,) = found["method.rank"]
    assert [point.at for point in run] == list(KNOBS)
    experts = [0.9 + step / 100 for step in range(8)]
    for rank, point in zip(KNOBS, run, strict=True):
        seeds = [100 * statistics.fmean((0.7 + rank / 1000 + up + step / 100) / experts[step] for step in range(8))
                 for up in (0, 0.02)]  # fmt: skip
        assert point.score == pytest.approx(statistics.fmean(seeds))
        assert point.deviation == pytest.approx(statistics.stdev(seeds))


def test_accuracy_against_the_number_of_tasks_is_the_mean_over_sets():
    sets = [TASKS[:2], TASKS[2:4], TASKS[:4], TASKS]
    some = [make(method, level, tasks=tasks, checkpoints={"base": "b", **{task: task for task in tasks}})
            for tasks in sets for make, method, level in
            ((make_row, "expert", 0.9), (make_row, "ties", 0.6), (routed_row, "duet", 0.8))]  # fmt: skip
    some = [replace(row, config={**row.config, "suite": {"name": "mini8", "tasks": row.tasks}},
                    run_id=f"{row.run_id}{len(row.tasks)}{row.tasks[0]}") for row in some]  # fmt: skip
    some[1] = replace(some[1], accuracy=dict.fromkeys(sets[0], 0.45))
    made = report.sections(some)
    unit, found = by_count([section.summary for section in made])

    assert list(found) == ["ties", "duet"] and "experts'" in unit
    assert [point.at for point in found["ties"]] == [2, 4, 8]
    pair = [100 * statistics.fmean(share) for share in ((0.45 / 0.9, 0.45 / 0.91), (0.6 / 0.9, 0.61 / 0.91))]
    assert found["ties"][0].score == pytest.approx(statistics.fmean(pair))
    assert found["ties"][0].deviation == pytest.approx(statistics.stdev(pair)) and found["ties"][1].deviation is None
    tree = pages.read(report.page(made))
    assert [node.text for node in tree.all("h2")][:2] == ["Across tables", "mini8: scenes, cars"]
    assert not report.across(made[:2]), "one number of tasks is no curve"


def test_the_front_holds_what_nothing_beats():
    line = summarise([make_row()])[0].lines[0]
    places = [(at, score) for at in (1, 2, 3, 5, 8) for score in (10 + (at * 7) % 5, 10 + (at * 3) % 7)]
    points = [Point(line, at, score, None) for at, score in places]
    beaten = [any(a <= at and s >= score and (a, s) != (at, score) for a, s in places) for at, score in places]
    expected = sorted({place for place, lost in zip(places, beaten, strict=True) if not lost})
    assert [(point.at, point.score) for point in pareto(points)] == expected and 1 < len(expected) < len(places)


def test_figures_say_what_they_show(made):
    (section,) = made
    names = [drawn.name for drawn in section.figures]
    assert names[:3] == ["heatmap", "bytes", "knob-method.rank"] and names[-1] == "energy"
    assert sum(name.startswith("routing-") for name in names) == 6 == len(names) - 4
    for drawn in section.figures:
        ax = drawn.figure.axes[0]
        assert ax.get_xlabel() and drawn.title
        assert any("%" in said for said in (ax.get_xlabel(), ax.get_ylabel(), drawn.title))
    heat, scatter, knob = (drawn.figure.axes[0] for drawn in section.figures[:3])
    assert "MB" in scatter.get_xlabel() and scatter.get_xscale() == "log"
    assert scatter.containers and knob.containers, "error bars"
    assert [tick.get_text() for tick in knob.get_xticklabels()] == ["4", "8", "16", "64"]
    shown = [cell.get_text() for cell in heat.texts]
    assert shown[0] == f"{30 / 0.9:.1f}" and shown[-1].startswith("failed: ValueError")
    assert section.figures[1].caption.startswith("Front: ties, duet ")  # by bytes, and more accurate each
    assert "emr" not in section.figures[1].caption and "smile" not in section.figures[1].caption


def test_energy_is_drawn_by_layer_and_lines_that_hold_the_same_share_one():
    keys = [f"blocks.{layer}.mlp.{name}.weight" for layer in range(20) for name in ("c_fc", "c_proj")]
    shares = {key: [0.01 * number] * 8 for number, key in enumerate(keys)}
    some = [routed_row("duet", energy=shares), routed_row("twin", energy=shares), make_row("ties"),
            routed_row("smile", energy={"head.weight": [1.0] * 8})]  # fmt: skip
    drawn = energy_map(summarise(some)[0])
    assert drawn is not None
    ax = drawn.figure.axes[0]
    names = [tick.get_text() for tick in ax.get_xticklabels()]
    assert names == [*(f"{layer} mlp" for layer in range(20)), "other"]  # 40 matrices do not fit
    lines = [tick.get_text() for tick in ax.get_yticklabels()]
    assert sorted(lines) == ["duet (+1)", "smile"]
    cells = [cell.get_text() for cell in ax.texts]
    assert len(cells) == 21 and f"{0.5 * (38 + 39):.0f}" in cells and "100" in cells


def test_odd_folders_have_a_page_too():
    for some in ([failed_row()], [make_row("expert", 0.9)], [make_row("base", 0.0, tasks=["cars"])],
                 [make_row(), make_row(suite="other <b>", tasks=["cars"]), make_row(tasks=["cars", "signs"])],
                 [make_row("ties", tasks=[f"a_long_task_name_{n}" for n in range(20)], level=0.5)],
                 [make_row("ties", knobs={"rank": rank}, stored_bytes=0) for rank in (0, 1)]):  # fmt: skip
        pages.read(report.page(report.sections(some)))


def test_the_same_rows_make_the_same_page(text):
    assert report.page(report.sections(many_rows())) == text


def test_the_command_writes_the_page_and_figures_for_papers(tmp_path, capsys):
    folder = tmp_path / "results"
    few = [make_row("base", 0.3), make_row("expert", 0.9), make_row("ties"), failed_row(),
           *(routed_row("duet", 0.7 + rank / 1000, knobs={"rank": rank}) for rank in (4, 8))]  # fmt: skip
    for row in few:
        rows.write(row, folder)
    (folder / "damaged.json").write_text('{"run_id": "half')
    page, figures = tmp_path / "new" / "page.html", tmp_path / "figures"
    report.main([str(folder), "--output", str(page), "--figures", str(figures)])

    tree = pages.read(page.read_text("utf-8"))
    assert any("damaged.json" in node.text for node in tree.all("div", kind="warning"))
    assert len(list(tree.all("svg"))) == 6 == len(list(figures.glob("*.pdf"))) == len(list(figures.glob("*.png")))
    assert all(path.read_bytes().startswith(b"%PDF") for path in figures.glob("*.pdf"))
    for path in figures.glob("*.png"):
        picture = Image.open(path)
        assert picture.width in (2025, 975)  # 6.75 and 3.25 inches at 300 dpi
        assert len(picture.convert("L").getcolors()) > 20
    assert f"6 rows in {page} and 12 figures" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="No result rows"):
        (tmp_path / "empty").mkdir()
        report.main([str(tmp_path / "empty"), "--output", str(page)])
    with pytest.raises(SystemExit, match="Cannot write"):
        report.main([str(folder), "--output", str(page / "below.html")])
