"""The page holds what the rows hold, all by itself."""

import json
import re
import statistics
from dataclasses import replace

import pages
import pytest
from cells import TASKS, failed_row, make_row, routed_row, scores
from pages import SCRIPT, many_rows
from PIL import Image

from launchers import report, rows
from launchers.report import page, sections
from launchers.results.frame import summarise
from launchers.results.heat import energy_map, similarity_map
from launchers.results.notes import notes, warnings
from launchers.results.plot import declared, drawings
from launchers.results.table import columns
from merging.errors import UserError


@pytest.fixture(scope="module")
def made():
    return pages.shown()[0]


@pytest.fixture(scope="module")
def text():
    return pages.shown()[1]


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

    assert [cells[1].text for cells in shown] == [line.label if line.kind != "failed" else
        f"{line.label} ValueError: {SCRIPT} rank 0" for line in summary.lines.itertuples()]  # fmt: skip
    assert {"kind", "needs", "router", "granularity", "MB", "MMACs", "MACs", "norm", "mean", "total s"} <= set(headers)
    for column in columns(summary)[1:]:
        listed = [cells[headers.index(column.header)] for cells in shown]
        assert [cell.text for cell in listed] == [f"{cell.text} {cell.deviation}".strip() for cell in column.cells]
        bold = [bool(list(cell.all("strong", kind="best"))) for cell in listed]
        assert bold == [cell.bold for cell in column.cells], column.header
    listed = [item.text for item in next(tree.all("ul", kind="notes")).all("li")]
    assert listed == [" ".join(note.split()) for note in notes(summary, "framed")]


def test_a_failure_is_shown_whole_and_never_runs(text, tree):
    (error,) = tree.all("pre", kind="error")
    assert error.text == f"ValueError: {SCRIPT} rank 0 at line 3"
    assert SCRIPT not in text and len(list(tree.all("script"))) == 1
    assert any("1 of 12 lines failed: tsv_m" in node.text for node in tree.all("div", kind="warning"))


def test_mixed_origins_are_warned_of_and_uniform_ones_are_not():
    def warned(*some):
        return " ".join(warnings(summarise(some)[0]))

    one, other = make_row("ties"), make_row("average")
    assert warned(one, other) == ""
    assert "2 code versions: 1a2b3c4, ffff" in warned(one, replace(other, code="ffff"))
    assert "2 families: hub_a, mini8" in warned(one, replace(other, family="hub_a"))
    cars = {**other.splits, "cars": {"name": "test", "id": "new", "size": 500}}
    assert "different splits of cars" in warned(one, replace(other, splits=cars))
    assert "collapse in duet" in warned(one, routed_row("duet", collapsed=["cars"]))
    read = pages.read(page(sections(summarise([one, replace(other, code="ffff")]))))
    (warning,) = read.all("div", kind="warning")
    assert "2 code versions" in warning.text


def test_provenance_names_every_run_checkpoint_and_split(tree):
    told = tree.text
    for row in many_rows():
        assert row.run_id in told and row.code in told
        for name, content in [*row.checkpoints.items(), *((task, row.splits[task]["id"]) for task in TASKS)]:
            assert name in told and content in told


def test_accuracy_against_the_number_of_tasks_is_the_mean_over_sets():
    sets = [TASKS[:2], TASKS[2:4], TASKS[:4], TASKS]
    some = [make(method, level, tasks=tasks, checkpoints={"base": "b", **{task: task for task in tasks}})
            for tasks in sets for make, method, level in
            ((make_row, "expert", 0.9), (make_row, "ties", 0.6), (routed_row, "duet", 0.8))]  # fmt: skip
    some = [replace(row, config={**row.config, "suite": {"name": "mini8", "tasks": row.tasks}},
                    run_id=f"{row.run_id}{len(row.tasks)}{row.tasks[0]}") for row in some]  # fmt: skip
    some[1] = replace(some[1], scores=scores(dict.fromkeys(sets[0], 0.45)))
    plot = declared({"kind": "curve", "x": "tasks", "hue": "method"}, "here")
    (drawn,) = drawings(plot, "counts", summarise(some))
    (ax,) = drawn.figure.axes
    bars = {bar.get_label(): bar.lines for bar in ax.containers}

    assert sorted(bars) == ["duet", "ties"] and "normalised" in ax.get_ylabel()
    points, _, (whiskers,) = bars["ties"]
    assert list(points.get_xdata()) == [2, 4, 8]
    pair = [100 * statistics.fmean(share) for share in ((0.45 / 0.9, 0.45 / 0.91), (0.6 / 0.9, 0.61 / 0.91))]
    assert points.get_ydata()[0] == pytest.approx(statistics.fmean(pair))
    low, high = whiskers.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * statistics.stdev(pair))
    low, high = whiskers.get_segments()[1][:, 1]
    assert low == high, "one set, one seed"
    assert not drawings(plot, "counts", summarise(some[:3])), "one number of tasks is no curve"


def test_figures_say_what_they_show(made):
    (section,) = made
    made = [drawn for drawings in section.figures.values() for drawn in drawings]
    names = [drawn.name for drawn in made]
    assert names[:4] == ["heatmap", "similarity", "bytes", "levels"]
    assert names[-1] == "energy" and sum(name.startswith("routing-") for name in names) == 6 == len(names) - 5
    for drawn in made:
        ax = drawn.figure.axes[0]
        assert ax.get_xlabel() and drawn.title
        texts = (ax.get_xlabel(), ax.get_ylabel(), drawn.title)
        assert any("%" in text or "cosine" in text for text in texts)
    heat, _, scatter, levels = (drawn.figure.axes[0] for drawn in made[:4])
    assert "MB" in scatter.get_xlabel() and scatter.get_xscale() == "log"
    assert scatter.containers and levels.patches
    shown = [cell.get_text() for cell in heat.texts]
    assert shown[0] == f"{30 / 0.9:.1f}" and any(text.startswith("failed: ValueError") for text in shown)
    assert made[2].caption.startswith("Front: ties, duet ")  # by bytes, and more accurate each
    assert "emr" not in made[2].caption and "smile" not in made[2].caption
    assert re.fullmatch(r"base: \d+\.\d %, 10\.0 MB", made[2].tips["point-1"])


def test_similarity_is_the_mean_over_seeds_in_the_order_of_the_table():
    tasks = ["cars", "signs", "digits"]
    one = make_row("expert", tasks=tasks, similarity=[[1.0, 0.5, -0.1], [0.5, 1.0, 0.03], [-0.1, 0.03, 1.0]])
    other = make_row("expert", tasks=["digits", "cars", "signs"], seed=1,
                     similarity=[[0.0, 0.0, 0.0], [0.0, 1.0, 0.7], [0.0, 0.7, 1.0]])  # fmt: skip
    old = make_row("expert", tasks=tasks, seed=2)  # from before there was a similarity
    (summary,) = summarise([one, other, old, make_row("ties", tasks=tasks)])
    drawn = similarity_map(summary)
    assert drawn is not None
    ax = drawn.figure.axes[0]
    cells = [cell.get_text() for cell in ax.texts]
    assert cells == ["0.60", "-0.05", "0.60", "0.01", "-0.05", "0.01"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(summary.tasks)
    assert drawn.caption.startswith("Mean 0.188, largest 0.600: cars and signs")
    assert similarity_map(summarise([old])[0]) is None


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ([[1.0, 0.5]], "similarity is not tasks x tasks"),
        ([[1.0], [0.5, 1.0]], "similarity is not tasks x tasks"),
        ([1.0, 0.5], "similarity.0: Input should be"),
        ([[1.0, 1.5], [1.5, 1.0]], "similarity.0.1: Input should be"),
        ([[1.0, "0.5"], [0.5, 1.0]], "similarity.0.1: Input should be"),
        ([[1.0, float("nan")], [0.5, 1.0]], "similarity.0.1: Input should be"),
        ({"cars": 1.0}, "similarity: Input should be"),
    ],
)
def test_no_row_holds_a_similarity_that_is_none(tmp_path, wrong, reason):
    with pytest.raises(UserError, match=reason):
        rows.write(make_row("expert", tasks=["cars", "signs"], similarity=wrong), tmp_path)


def test_similarity_survives_the_disk_and_older_rows_have_none(tmp_path):
    row = make_row("expert", tasks=["cars", "signs"], similarity=[[1.0, -0.25], [-0.25, 1.0]])
    path = rows.write(row, tmp_path)
    assert rows.read(tmp_path) == [row]
    content = json.loads(path.read_text())
    del content["similarity"]
    path.write_text(json.dumps(content))
    assert rows.read(tmp_path) == [replace(row, similarity=[])]


def test_notes_of_a_long_table_name_a_dozen_lines():
    some = [make_row("ties", level / 100, knobs={"rank": level}) for level in range(40, 60)]
    some += [make_row("emr", 0.9, router="oracle"), make_row("twin", 0.95, router="oracle"), failed_row()]
    text = " ".join(notes(summarise(some)[0]))
    assert "search on the val split for ties rank=40, " in text and "ties rank=51 and 10 more." in text
    assert "(task identity given; no fair rival, never bold): emr, twin." in text
    assert "tsv_m failed (seed 0): ValueError: rank 0" in text


def test_energy_is_drawn_by_layer():
    keys = [f"blocks.{layer}.mlp.{name}.weight" for layer in range(20) for name in ("c_fc", "c_proj")]
    shares = {key: [0.01 * number] * 8 for number, key in enumerate(keys)}
    some = [routed_row("duet", energy=shares), make_row("ties"),
            routed_row("smile", energy={"head.weight": [1.0] * 8})]  # fmt: skip
    drawn = energy_map(summarise(some)[0])
    assert drawn is not None
    ax = drawn.figure.axes[0]
    names = [tick.get_text() for tick in ax.get_xticklabels()]
    assert names == [*(f"{layer} mlp" for layer in range(20)), "other"]
    lines = [tick.get_text() for tick in ax.get_yticklabels()]
    assert sorted(lines) == ["duet (routed)", "smile (routed)"]
    cells = [cell.get_text() for cell in ax.texts]
    assert len(cells) == 21 and f"{0.5 * (38 + 39):.0f}" in cells and "100" in cells


def test_odd_folders_have_a_page_too():
    for some in ([failed_row()], [make_row("expert", 0.9)], [make_row("base", 0.0, tasks=["cars"])],
                 [make_row(), make_row(suite="other <b>", tasks=["cars"]), make_row(tasks=["cars", "signs"])],
                 [make_row("ties", tasks=[f"a_long_task_name_{n}" for n in range(20)], level=0.5)],
                 [make_row("ties", knobs={"rank": rank}, stored_bytes=0) for rank in (0, 1)]):  # fmt: skip
        pages.read(page(sections(summarise(some))))


def test_the_same_rows_make_the_same_page(text):
    assert page(sections(summarise(many_rows()))) == text


def test_the_command_writes_the_page_and_figures_for_papers(tmp_path, capsys):
    folder = tmp_path / "results"
    few = [make_row("base", 0.3), make_row("expert", 0.9), make_row("ties"), failed_row(), routed_row("duet", 0.7)]
    for row in few:
        rows.write(row, folder)
    (folder / "damaged.json").write_text('{"run_id": "half')
    path, figures = tmp_path / "new" / "page.html", tmp_path / "figures"
    report.main([str(folder), "--output", str(path), "--figures", str(figures)])

    tree = pages.read(path.read_text("utf-8"))
    assert any("damaged.json" in node.text for node in tree.all("div", kind="warning"))
    assert len(list(tree.all("svg"))) == 4 == len(list(figures.glob("*.pdf"))) == len(list(figures.glob("*.png")))
    assert all(file.read_bytes().startswith(b"%PDF") for file in figures.glob("*.pdf"))
    for file in figures.glob("*.png"):
        picture = Image.open(file)
        assert picture.width in (2025, 975)  # 6.75 and 3.25 inches at 300 dpi
        assert len(picture.convert("L").getcolors()) > 20
    assert f"5 rows in {path} and 8 figures" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="No result rows"):
        (tmp_path / "empty").mkdir()
        report.main([str(tmp_path / "empty"), "--output", str(path)])
    with pytest.raises(SystemExit, match="Cannot write"):
        report.main([str(folder), "--output", str(path / "below.html")])


def test_the_command_opens_the_page_where_there_is_a_browser(tmp_path, capsys, monkeypatch):
    rows.write(failed_row(), tmp_path / "rows")
    command = [str(tmp_path / "rows"), "--output", str(tmp_path / "my page.html"), "--open"]
    opened = []
    monkeypatch.setattr(report.webbrowser, "open", lambda address: opened.append(address))
    monkeypatch.setattr(report.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    report.main(command)
    assert opened == [], "no screen: a browser in text would take over the terminal"

    monkeypatch.setenv("DISPLAY", ":0")
    report.main(command)
    report.main(command[:-1])
    assert opened == [(tmp_path / "my page.html").as_uri()] and "my%20page" in opened[0]

    def broken(address):
        raise report.webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(report.webbrowser, "open", broken)
    report.main(command)
    assert capsys.readouterr().out.count(f"1 rows in {tmp_path / 'my page.html'}") == 4
