"""What an ablation varied is found, and every experiment file draws what it says."""

import statistics

import experiments
import pytest
from cells import make_row, routed_row
from pages import KNOBS, many_rows

from launchers.results.frame import summarise
from launchers.results.report import html
from launchers.results.report.axes import choices, grids, runs
from launchers.results.report.bars import choice_figure
from launchers.results.report.counts import count_figures
from launchers.results.report.grids import grid_figure
from launchers.results.report.points import accuracy, measures


def one(rows):
    (summary,) = summarise(rows)
    return summary


def test_a_curve_joins_the_lines_that_differ_in_one_number():
    twin = [routed_row("twin", 0.8, knobs={"rank": 4, "init": 0.5})]  # differs in another knob too: no curve
    flags = [make_row("dare", level, knobs={"flag": flag}) for flag, level in ((True, 0.5), (False, 0.6))]
    summary = one([*many_rows(), *twin, *flags])
    found = runs(summary)

    assert list(found) == ["method.rank"] and len(found["method.rank"]) == 1
    (run,) = found["method.rank"]
    assert [at for at, _ in run] == list(KNOBS)
    experts = [0.9 + step / 100 for step in range(8)]
    for rank, line in run:
        point = accuracy(summary).point(line, rank)
        seeds = [100 * statistics.fmean((0.7 + rank / 1000 + up + step / 100) / experts[step] for step in range(8))
                 for up in (0, 0.02)]  # fmt: skip
        assert point.score == pytest.approx(statistics.fmean(seeds))
        assert point.deviation == pytest.approx(statistics.stdev(seeds))


def test_a_grid_is_filled_by_numbers_and_a_cross_is_none():
    levels = {(out, inner): out / 10 + inner / 100 for out in (1, 2, 4) for inner in (1, 2)}
    full = [make_row("ties", level, knobs={"out": out, "in": inner}) for (out, inner), level in levels.items()]
    summary = one(full)
    (grid,) = grids(summary)
    assert grid.knobs == ("method.in", "method.out"), "the longer axis is last"
    assert {(out, inner): line.mean.mean for (inner, out), line in grid.cells.items()} == pytest.approx(
        {place: level + 0.035 for place, level in levels.items()})  # fmt: skip
    ax = grid_figure(summary, grid, 1).figure.axes[0]
    assert [cell.get_text() for cell in ax.texts] == ["14.5", "24.5", "44.5", "15.5", "25.5", "45.5"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "4"] and "method.out" in ax.get_xlabel()

    cross = [make_row("ties", level, knobs={"out": out, "in": inner})
             for (out, inner), level in levels.items() if out == 1 or inner == 1]  # fmt: skip
    assert grids(one(cross)) == [] and set(runs(one(cross))) == {"method.out", "method.in"}


def test_words_are_bars_and_what_curves_show_is_not_shown_twice():
    rules = [make_row("ties", 0.4 + 0.1 * place, knobs={"rule": rule}, seed=seed)
             for place, rule in enumerate(("sum", "mean", "max")) for seed in (0, 1)]  # fmt: skip
    summary = one(rules)
    (choice,) = choices(summary)["method.rule"]
    assert choice.names == ("sum", "mean", "max")
    ax = choice_figure(summary, "method.rule", [choice]).figure.axes[0]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([43.5, 53.5, 63.5])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["sum", "mean", "max"]
    assert ax.texts[-1].get_text() == "ties"
    assert ax.get_xlim()[0] == 0, "a bar that does not begin at 0 lies"

    along = [
        make_row("ties", 0.4, knobs={"rule": rule, "rank": rank}) for rule in ("sum", "mean") for rank in (1, 2, 3)
    ]
    assert choices(one(along)) == {} and [len(run) for run in runs(one(along))["method.rank"]] == [3, 3]


def test_beside_accuracy_stands_what_the_ablation_changes():
    rows = [routed_row("duet", 0.7, sure=sure, knobs={"how": how}) for sure, how in ((0.9, "a"), (0.5, "b"))]
    summary = one(rows)
    assert [each.unit for each in measures(summary, [summary.lines])] == ["mean accuracy, %", "images routed right, %"]
    held = [routed_row("duet", 0.7, knobs={"how": how}, energy={"1.mlp": [share] * 8}) for share, how in
            ((0.2, "a"), (0.8, "b"))]  # fmt: skip
    summary = one(held)
    assert [each.unit for each in measures(summary, [summary.lines])] == ["mean accuracy, %", "energy kept, %"]
    assert len(choice_figure(summary, "method.how", choices(summary)["method.how"]).figure.axes) == 2


CURVE = {  # experiment -> its figure, its panels, and the curves in each
    "coefficient": ("knob-method.scale", ["experts'"], 4),
    "mask_scaling": ("knob-method.neurons.ratio", ["experts'"], 4),
    "task_rank": ("knob-method.ranks.task", ["experts'", "energy kept"], 1),
    "twin_sparsity": ("knob-method.keep", ["experts'"], 3),
    "bytes_duet": ("sizes", ["experts'"], 3),
    "mini8_bytes": ("sizes", ["experts'"], 2),
    "bytes_twin": ("sizes", ["experts'"], 1),
}
GRID = {  # experiment -> its panels and its cells
    "ranks_per_mode": (["experts'"], 9, ("method.ranks.value", "method.ranks.in_value")),
    "router_losses": (["experts'", "routed right"], 12,
                      ("router.train.entropy", "router.train.marginal", "router.train.distillation")),
}  # fmt: skip
OTHERS = {"granularity", "twin_shared", "task_count", "seeds", "pareto"}  # of the files that say what they draw


@pytest.fixture
def drawn(monkeypatch):
    """The figure of this name among those that a page would show, without the time for two that every page has."""

    def draw(summary, name):
        for other in {"bytes", "level"} - {name.rstrip("s"), name}:
            monkeypatch.setattr(html, f"{other}_figure", lambda summary: None)
        (found,) = (each for each in html._curves(summary) if each.name == name)
        return found

    return draw


def test_every_file_that_says_what_it_draws_is_looked_at():
    assert set(experiments.DRAWS) == {*CURVE, *GRID, *OTHERS}


@pytest.mark.parametrize("name", CURVE)
def test_an_experiment_draws_its_curves(name, drawn):
    figure, panels, curves = CURVE[name]
    found = drawn(one(experiments.rows_of(f"experiment={name}", seeds=[0])), figure).figure
    assert len(found.axes) >= len(panels)
    for said in panels:
        (ax,) = (ax for ax in found.axes if said in ax.get_ylabel())
        values = {len(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) > 1}
        assert len(ax.lines) == curves and min(values) >= 5


@pytest.mark.parametrize("name", GRID)
def test_an_experiment_draws_its_heat_map(name, drawn):
    panels, cells, knobs = GRID[name]
    summary = one(experiments.rows_of(f"experiment={name}"))
    (grid,) = grids(summary)
    assert len(grid.cells) == cells and set(grid.knobs) == set(knobs)
    found = drawn(summary, f"grid-1-{grid.knobs[-1]}").figure
    for said in panels:
        (ax,) = (ax for ax in found.axes if said in ax.get_xlabel())
        assert len(ax.texts) == 2 * cells, "mean and deviation"


def test_the_granularity_experiment_draws_bars_of_accuracy_and_of_routing(drawn):
    found = drawn(one(experiments.rows_of("experiment=granularity")), "choice-router.gate.granularity").figure
    assert ["experts'" in found.axes[0].get_xlabel(), "routed right" in found.axes[1].get_xlabel()] == [True, True]
    names = {tick.get_text() for tick in found.axes[0].get_yticklabels()}
    assert {"sample", "token", "batch", "mixed"} <= names
    assert [len(ax.patches) for ax in found.axes[:2]] == [4, 4]


def test_twins_shared_experts_stand_beside_themselves_alone(drawn):
    alone = experiments.rows_of("method=average,task_arithmetic,ties", "scale=fixed")
    searched = experiments.rows_of("method=task_arithmetic", "method.scale=0.7", "scale=fixed")
    found = drawn(one([*experiments.rows_of("experiment=twin_shared"), *alone, *searched]), "choice-method.shared")
    names = [tick.get_text() for tick in found.figure.axes[0].get_yticklabels()]
    order = {"Average": "average", "TaskArithmetic": "task_arithmetic", "Ties": "ties"}
    assert sorted(names[::2]) == sorted(order)
    assert [f"alone: {order[name]}" for name in names[::2]] == names[1::2]


def test_the_number_of_tasks_is_averaged_over_orders():
    rows = experiments.rows_of("experiment=task_count", "count=two,four,eight", "method=ties,twin", seeds=[0])
    assert len({frozenset(row.tasks) for row in rows}) == 4 + 4 + 1
    summaries = summarise(rows)
    (found,) = count_figures(summaries)
    (ax,) = found.figure.axes
    names = [text.get_text() for text in found.figure.legends[0].get_texts()]
    assert sorted(names) == ["base", "ties", "twin"] == sorted(bar.get_label() for bar in ax.containers)
    (ties,) = (bar for bar in ax.containers if bar.get_label() == "ties")
    points, _, (bars,) = ties.lines
    pairs = [100 * line.norm.mean for summary in summaries for line in summary.lines
             if line.label == "ties" and len(summary.tasks) == 2]  # fmt: skip
    assert list(points.get_xdata()) == [2, 4, 8] and len(pairs) == 4
    assert points.get_ydata()[0] == pytest.approx(statistics.fmean(pairs))
    low, high = bars.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * statistics.stdev(pairs))


@pytest.mark.parametrize("name", ["seeds", "pareto"])
def test_the_other_figures_are_there(name, drawn):
    rows = experiments.rows_of("experiment=seeds", "method=task_arithmetic,ties,duet,twin")
    summary = one(rows)
    figure = drawn(summary, {"seeds": "levels", "pareto": "bytes"}[name]).figure
    if name == "seeds":
        (ax,) = figure.axes
        assert [tick.get_text() for tick in ax.get_yticklabels()] == [line.label for line in summary.lines[:-1]]
        assert sum(len(bar.lines[2]) for bar in ax.containers) == 5
    else:
        assert "Pareto front" in [text.get_text() for text in figure.legends[0].get_texts()]
