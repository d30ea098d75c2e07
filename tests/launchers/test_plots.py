"""The figures are whole pictures of the numbers they were given."""

from itertools import combinations

import numpy as np
import pytest
from cells import TASKS, failed_row, make_row, routed_row
from matplotlib.figure import Figure
from matplotlib.image import imread

from launchers.callback import draw
from launchers.results.curves import TOLD_APART, front_figure
from launchers.results.frame import summarise
from launchers.results.heat import WEIGHTS as SPAN
from launchers.results.heat import Panel, paint, routed, routing_map, score_map, weights
from launchers.results.plot import declared
from launchers.results.style import PAGE
from merging.errors import UserError

MERGED = [make_row("average", 0.5), make_row("ties", 0.7), failed_row()]
EXPERT = make_row("expert", 0.9)


def drawn(results):
    drawing = score_map(summarise(results))
    ax = drawing.figure.axes[0]
    return drawing, ax, [text.get_text() for text in ax.texts]


def test_cells_are_percent_of_the_expert():
    drawing, ax, texts = drawn([*MERGED, EXPERT])

    assert len(texts) == 2 * (len(TASKS) + 1) + 1  # the expert is the unit, a failure one text
    assert texts[0] == f"{50 / 0.9:.1f}" and texts[-1] == "failed: ValueError: rank 0"
    assert ax.get_xticklabels()[0].get_text() == "scenes (90.0)" and "expert's" in drawing.title


def test_without_an_expert_cells_are_plain_accuracy():
    drawing, ax, texts = drawn(MERGED)
    assert texts[0] == "50.0" and "expert" not in drawing.title and ax.get_xticklabels()[0].get_text() == "scenes"


def test_cells_fill_the_figure_beside_the_names_of_lines():
    tasks = [f"a task {index}" for index in range(8)]
    drawing, ax, _ = drawn([make_row(method, tasks=tasks) for method in ("average", "ffn_oracle_tsv", "expert")])
    drawing.figure.draw_without_rendering()
    ours = ax.get_window_extent().transformed(drawing.figure.transFigure.inverted())
    assert ax.get_xlim() == (0, len(tasks) + 1) and ours.x1 > 0.98 and drawing.width <= PAGE


def test_a_tall_map_names_its_tasks_where_reading_starts():
    for lines, place in ((30, "bottom"), (31, "top")):
        _, ax, _ = drawn([make_row(f"method_{line}") for line in range(lines)])
        assert len(ax.get_yticks()) == lines and ax.xaxis.get_ticks_position() == place


def test_names_on_a_crowded_front_leave_each_other_room():
    near = [make_row(f"method_{n}", level=0.3 + n / 100, stored_bytes=10**7 + 10**4 * n) for n in range(TOLD_APART + 6)]
    drawing = front_figure(summarise(near)[0])
    assert drawing is not None
    drawing.figure.draw_without_rendering()
    names = drawing.figure.axes[0].texts
    boxes = [name.get_window_extent() for name in names]
    assert names[0].get_text() == f"method_{TOLD_APART + 5}" and 2 <= len(names) < len(near), "the best is named"
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_the_files_are_whole_pictures(tmp_path):
    many = [*MERGED, EXPERT, make_row(suite="other", tasks=["cars"]), *map(routed_row, ("duet", "twin", "wemoe"))]
    files = draw(many, tmp_path / "new")
    assert {name: path.name for name, path in files.items()} == {"heatmap": "heatmap.png", "routing": "routing.png"}
    assert all(imread(path).shape[1] > 1000 for path in files.values())
    assert len(list((tmp_path / "new").iterdir())) == 2
    pareto = draw(many, tmp_path, declared({"kind": "pareto"}, "here"))
    assert pareto["plot"].name == "plot.png" and imread(pareto["plot"]).shape[1] > 1000
    assert set(draw([failed_row()], tmp_path)) == {"heatmap"}  # nothing but a failure is still a picture
    assert set(draw([make_row("duet", router="oracle")], tmp_path)) == {"heatmap"}, "no gates, no routing"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"heatmap\.png"):
        draw(MERGED, tmp_path / "file")


def test_routed_and_oracle_lines_say_what_they_are():
    oracle = make_row("ffn_oracle", 0.6, router="oracle")
    _, ax, _ = drawn([*MERGED, EXPERT, oracle, routed_row("duet", 0.5), routed_row("twin", 0.7)])
    names = [label.get_text() for label in ax.get_yticklabels()]

    assert names == ["average", "ties", "duet (routed)", "twin (routed)", "ffn_oracle (oracle)", "tsv_m"]


def test_the_routing_figure_is_the_mean_over_seeds_in_the_order_of_the_tasks():
    order = TASKS[::-1]
    skewed = [[1.0 if other == "cars" else 0.0 for other in order] for _ in order]
    flipped = routed_row(seed=1, tasks=order, routing={"matrix": skewed, "accuracy": dict.fromkeys(order, 0.0)})
    (summary,) = summarise([routed_row(sure=0.9), flipped])
    (pair,) = routed(summary)

    cars = TASKS.index("cars")
    expected = (np.full((8, 8), 0.1 / 7) + (0.9 - 0.1 / 7) * np.eye(8) + np.eye(8)[[cars] * 8]) / 2
    assert weights(*pair).to_numpy() == pytest.approx(expected)

    drawing = routing_map([pair])
    ax = drawing.figure.axes[0]
    texts = [text.get_text() for text in ax.texts]
    assert len(texts) == 64 and texts[:3] == ["45", "51", "1"] and texts[9] == "95"
    right = [0.9 + 0.035, 0.0]
    assert f"duet: {50 * sum(right):.1f} ±{100 * np.std(right, ddof=1):.1f} %" in drawing.caption
    assert [label.get_text() for label in ax.get_yticklabels()] == TASKS


def test_weights_outside_zero_and_one_are_drawn():
    wild = [[3.0, -1.0], [0.0, 0.5]]
    row = routed_row(tasks=["cars", "signs"], routing={"matrix": wild, "accuracy": {"cars": 1.0, "signs": 1.0}})
    (summary,) = summarise([row])
    ax = Figure().subplots()
    (pair,) = routed(summary)
    paint(ax, Panel("", 100 * weights(*pair)), SPAN, 0)
    assert [text.get_text() for text in ax.texts] == ["300", "-100", "0", "50"]
    assert ax.collections[0].norm.vmin == -100 and ax.collections[0].norm.vmax == 300
