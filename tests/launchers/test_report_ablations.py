"""Every experiment draws the figure that it declares."""

import statistics

import experiments
import pytest
from cells import make_row, routed_row
from pages import many_rows

from launchers.results.frame import summarise
from launchers.results.plot import declared, drawings, of_experiments
from merging.errors import UserError

PLOTS = {name: plot for plot, names in of_experiments().items() for name in names.split(", ")}


def drawn(rows, **plot):
    return drawings(declared(plot, "this test"), "mine", summarise(rows))


def test_a_curve_joins_the_lines_that_differ_in_x_alone():
    twin = [routed_row("twin", 0.8, knobs={"rank": 4, "init": 0.5})]  # differs in another option too: no curve
    flags = [make_row("dare", level, knobs={"flag": flag}) for flag, level in ((True, 0.5), (False, 0.6))]
    (drawing,) = drawn([*many_rows(), *twin, *flags], kind="curve", x="method.rank")
    (ax,) = drawing.figure.axes
    (bars,) = ax.containers
    points, _, (whiskers,) = bars.lines
    assert list(points.get_xdata()) == [4, 8, 16, 64] and bars.get_label() == "duet"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["4", "8", "16", "64"]
    experts = [0.9 + step / 100 for step in range(8)]
    for place, rank in enumerate((4, 8, 16, 64)):
        seeds = [100 * statistics.fmean((0.7 + rank / 1000 + up + step / 100) / experts[step] for step in range(8))
                 for up in (0, 0.02)]  # fmt: skip
        low, high = whiskers.get_segments()[place][:, 1]
        assert points.get_ydata()[place] == pytest.approx(statistics.fmean(seeds))
        assert high - low == pytest.approx(2 * statistics.stdev(seeds))
    assert drawn([*many_rows(), *flags], kind="curve", x="method.flag") == [], "no number"


def test_what_differs_in_more_than_was_declared_is_another_figure():
    rows = [make_row("ties", 0.4 + rank / 10 + keep, knobs={"rank": rank, "keep": keep})
            for rank in (1, 2, 3) for keep in (0.1, 0.2)]  # fmt: skip
    assert len(drawn(rows, kind="curve", x="method.rank")) == 2
    (both,) = drawn(rows, kind="curve", x="method.rank", hue="method.keep")
    assert [bar.get_label() for bar in both.figure.axes[0].containers] == ["ties keep=0.1", "ties keep=0.2"]
    (apart,) = drawn(rows, kind="curve", x="method.rank", facet="method.keep")
    assert [ax.get_title(loc="left") for ax in apart.figure.axes] == ["keep=0.1", "keep=0.2"]


def test_a_grid_holds_means_and_deviations():
    levels = {(out, inner): out / 10 + inner / 100 for out in (1, 2, 4) for inner in (1, 2)}
    full = [make_row("ties", level, knobs={"out": out, "in": inner}) for (out, inner), level in levels.items()]
    (drawing,) = drawn(full, kind="grid", x="method.out", hue="method.in")
    (ax,) = drawing.figure.axes
    assert [cell.get_text() for cell in ax.texts] == ["14.5", "24.5", "44.5", "15.5", "25.5", "45.5"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "4"] and "method.out" in ax.get_xlabel()


def test_bars_are_ordered_and_begin_at_zero():
    rules = [make_row("ties", 0.4 + 0.1 * place, knobs={"rule": rule}, seed=seed)
             for place, rule in enumerate(("sum", "mean", "max")) for seed in (0, 1)]  # fmt: skip
    (drawing,) = drawn(rules, kind="bars", x="method.rule")
    (ax,) = drawing.figure.axes
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([43.5, 53.5, 63.5])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["sum", "mean", "max"]
    assert ax.texts[-1].get_text() == "ties"
    assert ax.get_xlim()[0] == 0, "a bar that does not begin at 0 lies"


@pytest.mark.parametrize(("text", "message"), [
    ("{kind: pie, x: method.keep}", "kind: Input should be"), ("{kind: curve}", "has no x"), ("{x: a.b}", "kind"),
    ("{kind: curve, x: method.keep, colour: seed}", "colour"), ("[curve]", "cannot be"), ("{kind", "cannot be"),
])  # fmt: skip
def test_a_plot_that_says_too_little_is_refused(text, message):
    with pytest.raises(UserError, match=rf"plot of --plot .*{message}"):
        declared(text, "--plot")


def test_every_experiment_declares_a_figure():
    assert set(PLOTS) == {path.stem for path in experiments.FOLDER.glob("*.yaml")}


CURVES = {  # experiment -> curves in each panel
    "coefficient": 4, "mask_scaling": 4, "task_rank": 1, "twin_sparsity": 3, "bytes_duet": 3, "mini8_bytes": 2,
    "bytes_twin": 1,
}  # fmt: skip
GRIDS = {"ranks_per_mode": 9, "router_losses": 12}  # experiment -> cells of each panel


@pytest.mark.parametrize("name", CURVES)
def test_an_experiment_draws_its_curves(name):
    (drawing,) = drawings(PLOTS[name], name, summarise(experiments.rows_of(f"experiment={name}", seeds=[0])))
    assert len(drawing.figure.axes) == len(PLOTS[name].y)
    for ax in drawing.figure.axes:
        values = [len(line.get_xdata()) for line in ax.lines]
        assert len(ax.lines) == CURVES[name] and min(values) >= 5


@pytest.mark.parametrize("name", GRIDS)
def test_an_experiment_draws_its_heat_map(name):
    (drawing,) = drawings(PLOTS[name], name, summarise(experiments.rows_of(f"experiment={name}")))
    assert len(drawing.figure.axes) == len(PLOTS[name].y)
    for ax in drawing.figure.axes:
        assert len(ax.texts) == GRIDS[name] and all("±" in text.get_text() for text in ax.texts)


def test_the_granularity_experiment_draws_bars_of_accuracy_and_of_routing():
    rows = experiments.rows_of("experiment=granularity")
    (drawing,) = drawings(PLOTS["granularity"], "granularity", summarise(rows))
    one, other = drawing.figure.axes
    assert "normalised" in one.get_xlabel() and "routing accuracy" in other.get_xlabel()
    assert {"sample", "token", "batch", "mixed"} == {tick.get_text() for tick in one.get_yticklabels()}
    assert [len(ax.patches) for ax in drawing.figure.axes] == [4, 4]


def test_twins_shared_experts_have_a_bar_each():
    (drawing,) = drawings(PLOTS["twin_shared"], "twin_shared", summarise(experiments.rows_of("experiment=twin_shared")))
    names = [tick.get_text() for tick in drawing.figure.axes[0].get_yticklabels()]
    assert sorted(names) == ["Average", "TaskArithmetic", "Ties"]


def test_the_number_of_tasks_is_averaged_over_orders():
    rows = experiments.rows_of("experiment=task_count", "count=two,four,eight", "method=ties,twin", seeds=[0])
    assert len({frozenset(row.tasks) for row in rows}) == 4 + 4 + 1
    summaries = summarise(rows)
    (drawing,) = drawings(PLOTS["task_count"], "task_count", summaries)
    (ax,) = drawing.figure.axes
    names = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert sorted(names) == ["base", "ties", "twin"] == sorted(bar.get_label() for bar in ax.containers)
    (ties,) = (bar for bar in ax.containers if bar.get_label() == "ties")
    points, _, (bars,) = ties.lines
    pairs = [line.norm for summary in summaries for line in summary.lines.itertuples()
             if line.label == "ties" and len(summary.tasks) == 2]  # fmt: skip
    assert list(points.get_xdata()) == [2, 4, 8] and len(pairs) == 4
    assert points.get_ydata()[0] == pytest.approx(statistics.fmean(pairs))
    low, high = bars.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * statistics.stdev(pairs))


def test_the_other_figures_are_there():
    (summary,) = summarise(experiments.rows_of("experiment=seeds", "method=task_arithmetic,ties,duet,twin"))
    (levels,) = drawings(PLOTS["seeds"], "seeds", [summary])
    (ax,) = levels.figure.axes
    names = [tick.get_text().removesuffix(" (routed)") for tick in ax.get_yticklabels()]
    assert names == list(summary.lines["label"][:-1])
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(list(summary.lines["norm"][:-1]))
    (pareto,) = drawings(PLOTS["pareto"], "pareto", [summary])
    assert "Pareto front" in [text.get_text() for text in pareto.figure.legends[0].get_texts()]
    (scores,) = drawings(PLOTS["mini8"], "mini8", [summary])
    assert scores.name == "heatmap"


def test_a_pool_of_lines_that_fill_no_axis_has_no_figure():
    apart = [make_row(method, 0.5, knobs={"scale": scale}) for method, scale in (("ties", 0.3), ("tsv_m", 1.0))]
    assert drawn(apart, kind="curve", x="method.scale", hue="method") == [], "a value a curve is none"
    twice = [make_row("ties", 0.5, knobs={"out": out, "in": 1}, checkpoints={"base": base})
             for out in (1, 2) for base in "ab"]  # fmt: skip
    (drawing,) = drawn(twice, kind="grid", x="method.out", hue="method.in")
    assert len(drawing.figure.axes[0].texts) == 2, "merged from other checkpoints: their mean"
    assert drawn([make_row("base", 0.3)], kind="bars", x="method.rule") == []
