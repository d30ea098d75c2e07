"""The figures are whole PNGs of the numbers they were given."""

import numpy as np
import pytest
from cells import TASKS, failed_row, make_row, routed_row
from matplotlib.figure import Figure
from matplotlib.image import imread

from launchers.results import routing_figure
from launchers.results.frame import summarise
from launchers.results.plots import GAP, _panel, heatmap
from merging.errors import UserError

MERGED = [make_row("average", 0.5), make_row("ties", 0.7), failed_row()]
EXPERT = make_row("expert", 0.9)


def drawn(results):
    ax = Figure().subplots()
    _panel(ax, summarise(results)[0])
    return ax, [text.get_text() for text in ax.texts]


def test_cells_are_percent_of_the_expert():
    ax, texts = drawn([*MERGED, EXPERT])

    assert len(texts) == 2 * (len(TASKS) + 1) + 1  # the expert is the unit, a failure one bar
    assert texts[0] == f"{50 / 0.9:.1f}" and texts[-1] == "failed: ValueError: rank 0"
    assert ax.get_xticklabels()[0].get_text() == "scenes\nexpert 90.0"
    assert "expert's" in ax.get_title(loc="left")


def test_without_an_expert_cells_are_plain_accuracy():
    ax, texts = drawn(MERGED)
    assert texts[0] == "50.0" and "expert" not in ax.get_title(loc="left")


def test_the_file_is_a_picture_and_whole(tmp_path):
    path = heatmap([*MERGED, EXPERT, make_row(suite="other", tasks=["cars"])], tmp_path / "new" / "map.png")
    assert imread(path).shape[1] > 1000 and list(path.parent.iterdir()) == [path]
    assert heatmap([failed_row()], path) == path  # nothing but a failure is still a picture

    with pytest.raises(UserError, match="no rows"):
        heatmap([], path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"map\.png"):
        heatmap(MERGED, tmp_path / "file" / "map.png")


def test_routed_and_oracle_lines_stand_apart_and_say_what_they_are():
    oracle = make_row("ffn_oracle", 0.6, router="oracle")
    ax, texts = drawn([*MERGED, EXPERT, oracle, routed_row("duet", 0.5), routed_row("twin", 0.7)])
    names = [label.get_text() for label in ax.get_yticklabels()]

    assert names == ["average", "ties", "duet", "twin", "ffn_oracle", "tsv_m"]  # what may be compared is together
    assert ax.get_yticks() == pytest.approx([0.5, 1.5, 2.5 + GAP, 3.5 + GAP, 4.5 + 2 * GAP, 5.5 + 3 * GAP])
    assert texts[-2:] == ["routed\nper input", "told the\ntrue task"]
    assert drawn(MERGED)[0].get_ylim() == (3, 0)  # without them no gap


def test_the_routing_figure_is_the_mean_over_seeds_in_the_order_of_the_tasks():
    order = TASKS[::-1]
    skewed = [[1.0 if other == "cars" else 0.0 for other in order] for _ in order]
    flipped = routed_row(seed=1, tasks=order, routing={"matrix": skewed, "accuracy": dict.fromkeys(order, 0.0)})
    (summary,) = summarise([routed_row(sure=0.9), flipped])
    (line,) = summary.lines
    weights = routing_figure.matrix(line, summary.tasks)

    cars = TASKS.index("cars")
    expected = (np.full((8, 8), 0.1 / 7) + (0.9 - 0.1 / 7) * np.eye(8) + np.eye(8)[[cars] * 8]) / 2
    assert weights == pytest.approx(expected)

    ax = Figure().subplots()
    routing_figure._panel(ax, summary, line)
    texts = [text.get_text() for text in ax.texts]
    assert len(texts) == 64 and texts[:3] == ["45", "51", "1"] and texts[9] == "95"
    right = [0.9 + 0.035, 0.0]
    assert f"routed right {50 * sum(right):.1f} ±{100 * np.std(right, ddof=1):.1f} %" in ax.get_title(loc="left")
    assert [label.get_text() for label in ax.get_yticklabels()] == TASKS


def test_weights_outside_zero_and_one_are_drawn():
    wild = [[3.0, -1.0], [0.0, 0.5]]
    row = routed_row(tasks=["cars", "signs"], routing={"matrix": wild, "accuracy": {"cars": 1.0, "signs": 1.0}})
    ax = Figure().subplots()
    (summary,) = summarise([row])
    routing_figure._panel(ax, summary, summary.lines[0])
    assert [text.get_text() for text in ax.texts] == ["300", "-100", "0", "50"]
    assert ax.collections[0].norm.vmin == -1 and ax.collections[0].norm.vmax == 3


def test_the_routing_figure_exists_where_gates_routed(tmp_path):
    path = tmp_path / "routing.png"
    assert routing_figure.routing_figure([*MERGED, EXPERT, make_row("duet", router="oracle")], path) is None
    assert list(tmp_path.iterdir()) == []
    many = [*MERGED, *(routed_row(method) for method in ("duet", "twin", "wemoe", "smile"))]
    assert routing_figure.routing_figure(many, path) == path and imread(path).shape[1] > 1000
    with pytest.raises(UserError, match=r"routing\.png"):
        routing_figure.routing_figure(many, path / "routing.png")
