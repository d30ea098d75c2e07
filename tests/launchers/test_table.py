"""The table computes what it claims, loses nothing and says where its numbers come from."""

import csv
import io
import statistics
from dataclasses import replace

import pytest
from cells import TASKS, failed_row, make_row, routed_row

from launchers import rows
from launchers.results import writers
from launchers.results.frame import of_rows, summarise
from launchers.results.notes import notes
from launchers.results.table import columns, records, sheets
from launchers.table import main
from merging.errors import UserError
from merging.needs import LABELS
from tasks.score import Score

REFERENCES = [make_row("base", 0.3), make_row("expert", 0.9)]


def terminal(results, width=120):
    return writers.terminal(sheets(results), width)


def labels(summary):
    return list(summary.lines["label"])


def bold(summary, header):
    """The lines that are the best of a column."""
    (column,) = (column for column in columns(summary) if column.header == header)
    return [label for label, cell in zip(labels(summary), column.cells, strict=True) if cell.bold]


def printed(results, header):
    """Method -> text of one column."""
    (summary,) = summarise(results)
    (column,) = (column for column in columns(summary) if column.header == header)
    return {label: cell.text for label, cell in zip(labels(summary), column.cells, strict=True)}


def test_norm_is_the_mean_of_ratios_beside_the_plain_mean():
    merged = make_row("ties", tasks=["cars", "signs"], accuracy={"cars": 0.2, "signs": 0.9})
    expert = make_row("expert", tasks=["cars", "signs"], accuracy={"cars": 0.4, "signs": 0.9})

    assert printed([merged, expert], "norm") == {"ties": "75.0", "expert": "100.0"}  # not 0.55 / 0.65
    assert printed([merged, expert], "mean") == {"ties": "55.0", "expert": "65.0"}


def test_scores_of_other_metrics_are_named_and_those_without_a_ratio_are_left_out_of_norm():
    def scores(cars, signs, digits):
        return {"cars": Score("matthews", cars, 50, 0.1), "signs": Score("accuracy", signs, 50, 0.1),
                "digits": Score("error", digits, 50, 0.1, higher_is_better=False)}  # fmt: skip

    results = [replace(make_row(method, tasks=["cars", "signs", "digits"]), scores=scores(*values))
               for method, values in (("ties", (0.3, 0.4, 0.5)), ("expert", (0.6, 0.8, 0.25)))]  # fmt: skip
    assert printed(results, "cars (matthews)") == {"ties": "30.0", "expert": "60.0"} and printed(results, "signs")
    assert printed(results, "norm") == {"ties": "50.0", "expert": "100.0"}, "an error has no share of the expert's"
    said = notes(summarise(results)[0])
    assert said[0].startswith("Scores (cars: matthews, signs: accuracy, digits: error) in percent on the test split")
    assert "Not in norm: digits." in said[1]
    frame = of_rows(results).set_index(["method", "task"])
    assert frame.loc[("ties", "cars"), ["metric", "score", "count", "standard_error", "normalised"]].tolist() == [
        "matthews", 0.3, 50, 0.1, 0.5]  # fmt: skip


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"suite": "mini8b"}, {"checkpoints": {"base": "other"}}, {"splits": {}}]
)
def test_no_norm_without_the_matching_expert(other):
    results = summarise([make_row("ties"), make_row("expert", 0.9, **other)])
    lines = next(summary.lines for summary in results if "ties" in labels(summary))
    ties = lines[lines["label"] == "ties"].iloc[0]

    assert ties[["norm", *(f"norm {task}" for task in TASKS)]].isna().all()
    assert "no expert row" in " ".join(notes(results[0]))


def test_order_and_bold():
    results = [make_row("expert", 0.9), make_row("ties", 0.7), failed_row(), make_row("average", 0.5),
               make_row("base", 0.3), make_row("routed", 0.8, router="entropy")]  # fmt: skip
    (summary,) = summarise(results)
    mean = next(column for column in columns(summary) if column.header == "mean")

    assert labels(summary) == ["base", "average", "ties", "routed", "tsv_m", "expert"]
    assert [cell.bold for cell in mean.cells] == [False, False, True, False, False, False]  # best static one
    assert mean.cells[4].text == "failed"
    assert printed(results, "router")["routed"] == "entropy"


ORACLES = [make_row(method, level, router="oracle") for method, level in (("ffn_oracle", 0.65), ("emr", 0.88))]
DYNAMIC = [*REFERENCES, make_row("ties", 0.6), make_row("tsv_m", 0.7), routed_row("duet", 0.75),
           routed_row("twin", 0.8), *ORACLES]  # fmt: skip


def test_static_routed_and_oracle_lines_are_ordered_and_judged_apart():
    (summary,) = summarise([*DYNAMIC, failed_row("iso_c")])
    for column in columns(summary):
        if column.header in (*TASKS, "mean", "norm"):
            assert bold(summary, column.header) == ["tsv_m", "twin"]
    assert labels(summary) == [
        "base", "ties", "tsv_m", "duet", "twin", "ffn_oracle", "emr", "iso_c", "expert"
    ]  # fmt: skip
    assert summary.breaks == [2, 4, 6] and writers.latex(sheets(DYNAMIC)).count(r"\\ \midrule") == 3
    assert summarise([*REFERENCES, make_row(), failed_row()])[0].breaks == []
    said = " ".join(notes(summary))
    assert "Bold: best static and best routed line." in said
    assert "Oracle (task identity given; no fair rival, never bold): ffn_oracle, emr." in said
    assert "Saw the unlabelled calibration samples: duet, twin." in said
    assert "Routing accuracy (largest weight on the own task), in percent: duet 93.5, twin 93.5." in said


def test_what_saw_the_test_images_is_marked_and_never_bold():
    seen = routed_row("wemoe", 0.9, adaptation="test")
    (summary,) = summarise([*DYNAMIC, seen])
    said = " ".join(notes(summary))

    assert bold(summary, "mean") == ["tsv_m", "twin"]
    assert printed([*DYNAMIC, seen], "adapt")["wemoe"] == "test"
    assert "Saw the unlabelled test samples (transductive; no fair rival, never bold): wemoe." in said
    labelled = routed_row("wemoe", 0.9, adaptation="val", opened={"val": [f"method=wemoe{LABELS}"]})
    assert "Saw the labelled val samples: wemoe." in " ".join(notes(summarise([*DYNAMIC, labelled])[0]))
    assert "adapt" not in [column.header for column in columns(summarise(DYNAMIC)[0])]
    assert "transductive" not in " ".join(notes(summarise(DYNAMIC)[0]))


def test_what_was_routed_by_batches_of_one_task_is_marked_and_never_bold():
    batch = routed_row("wemoe", 0.9, granularity="batch")
    (summary,) = summarise([*DYNAMIC, batch])
    assert bold(summary, "mean") == ["tsv_m", "twin"]
    told = "One set of weights per batch of one task, which tells it (no fair rival, never bold): wemoe."
    grouped = notes(summarise([*DYNAMIC, routed_row("twin", 0.9, granularity="group")])[0])
    assert any(
        "per group of similar samples of the whole split" in note and note.endswith(": twin.") for note in grouped
    )
    assert told in notes(summary) and "per batch" not in " ".join(notes(summarise(DYNAMIC)[0]))


def test_work_is_told_relative_to_the_static_forward():
    macs = printed(DYNAMIC, "MACs")
    assert macs == dict.fromkeys(macs, "x1.00") | {"duet": "x1.26", "twin": "x1.26"}  # 12.6 M of 10 M
    assert printed(DYNAMIC, "router s")["duet"] == "6.08" and printed(DYNAMIC, "router s")["ties"] == "-"
    foreign = routed_row("wemoe", config={"backbone": "another"})
    assert printed([*DYNAMIC, foreign], "MACs")["wemoe"] == "-"  # no static row of that backbone


def test_a_static_table_has_no_columns_of_routed_ones():
    (summary,) = summarise([*REFERENCES, make_row()])
    assert not {column.header for column in columns(summary)} & {"router", "adapt", "MACs", "router s"}
    assert not [note for note in notes(summary) if "MACs" in note or "oracle" in note]


def test_what_must_be_said_about_the_experts_stands_below_once():
    leak = "The DTD expert has seen test images."
    results = [make_row("expert", 0.8, remarks=[leak]), make_row("ties", 0.6, remarks=[leak]), make_row("base", 0.4)]
    with_it, without = (notes(summarise(some)[0]) for some in (results, results[2:]))
    assert with_it.count(leak) == 1 and leak not in without


def test_collapsed_tasks_are_named():
    rows = [routed_row(collapsed=["cars", "signs"], seed=1), routed_row()]
    assert "Suspected of collapse: cars, signs in duet (seed 1)." in notes(summarise(rows)[0])


def test_what_overflows_stands_beside_the_mean_scores():
    seeds = [routed_row(seed=seed, level=0.8 + seed / 50) for seed in (0, 1)]
    page = terminal([*seeds, *(make_row(method, seed=seed) for seed in (0, 1) for method in ("ties", "base"))])
    heads = [line.split() for line in page.splitlines() if line.startswith("method")]

    assert heads == [
        ["method", "n", *TASKS, "mean", "norm"],
        ["method", "mean", "norm", "scale", "needs", "router", "MB", "MACs", "merge", "s", "router", "s"],
    ]
    assert all(len(line.rstrip()) <= 120 for line in page.splitlines())


def test_routers_of_one_method_are_told_apart_by_name():
    gate = {"_target_": "merging.routing.gates.GateShape", "depth": 1}
    learned = {"_target_": "merging.fit.gates.Learned", "name": "task_id", "gate": gate}
    configs = [{"router": learned}, {"router": learned | {"gate": gate | {"depth": 2}}},
               {"router": {"_target_": "merging.fit.gates.Oracle", "name": "oracle"}}]  # fmt: skip
    results = [routed_row(config=config, run_id=str(index)) for index, config in enumerate(configs[:2])]
    results.append(make_row("duet", 0.9, config=configs[2], run_id="2", router="oracle"))
    assert set(labels(summarise(results)[0])) == {
        "duet router=task_id depth=1",
        "duet router=task_id depth=2",
        "duet router=oracle",
    }

    rest = [{"_target_": f"merging.methods.{name}", "scale": scale} for name, scale in (("Tsv", 1.0), ("Ties", 0.3))]
    results = [routed_row(knobs={"rest": method}) for method in rest]
    assert set(labels(summarise(results)[0])) == {"duet rest=Tsv", "duet rest=Ties"}


def test_seeds_become_mean_and_sample_deviation():
    levels = [0.5, 0.6, 0.65]
    results = [make_row("ties", level, seed=seed) for seed, level in enumerate(levels)]
    (line,) = summarise([*results, results[0]])[0].lines.to_dict("records")  # the same run twice counts once

    assert len(line["rows"]) == 3
    assert line["task scenes"] == pytest.approx(100 * statistics.mean(levels))
    assert line["task scenes sd"] == pytest.approx(100 * statistics.stdev(levels))
    assert printed(results, "n") == {"ties": "3"} and "±7.6" in terminal(results)


def test_configs_of_one_method_stay_apart_and_are_told_apart():
    results = [make_row("ties", 0.6, knobs={"keep": keep, "merge": "sum"}) for keep in (0.1, 0.2)]
    (summary,) = summarise(
        [*results, make_row("ties", 0.6, knobs={"keep": 0.2, "merge": "sum"}, checkpoints={"a": "b"})]
    )

    assert labels(summary) == ["ties keep=0.1", "ties keep=0.2", "ties keep=0.2"]
    assert "different checkpoints" in " ".join(notes(summary))


def test_a_long_list_is_told_by_its_ends():
    grids = [[0.1, 0.5], [tenth / 10 for tenth in range(1, 31)]]
    made = [
        make_row("ties", config={"method": {}, "scale": {"scales": grid}}, run_id=f"{n:012}")
        for n, grid in enumerate(grids)
    ]
    (summary,) = summarise(made)
    assert set(labels(summary)) == {"ties scales=[0.1, 0.5]", "ties scales=30 from 0.1 to 3.0"}


def test_names_in_another_order_are_told_one_by_one():
    orders = ["a", "b", "c", "d", "e"], ["a", "c", "b", "d", "e"]
    made = [make_row("ties", config={"suite": {"tasks": tasks}}, run_id=f"{n:012}") for n, tasks in enumerate(orders)]
    (summary,) = summarise(made)
    assert set(labels(summary)) == {f"ties tasks={tasks}" for tasks in orders}


def test_notes_name_mixed_origins_failures_and_how_scales_were_picked():
    results = [make_row("ties"), make_row("average", code="other", family="hub", scale_source="fixed"), failed_row()]
    said = " ".join(notes(summarise(results)[0]))

    assert "test split (500 samples a task)" in said
    assert "picked by search on the val split for ties; fixed for average" in said
    assert "tsv_m failed (seed 0): ValueError: rank 0" in said and "line 3" not in said
    assert "different code versions: 1a2b3c4, other" in said and "different families: hub, mini8" in said


@pytest.mark.parametrize(("seeds", "width"), [(1, 120), (3, 120), (1, 60), (3, 40), (1, 20)])
def test_the_terminal_table_fits_and_drops_nothing(seeds, width):
    results = [make_row(method, level, seed=seed) for seed in range(seeds)
               for method, level in (("task_arithmetic", 0.61), ("expert", 0.9))]  # fmt: skip
    page = terminal(results, width)

    assert all(len(line.rstrip()) <= width for line in page.splitlines())
    for text in (*TASKS, "61.0", "64.5", "69.0", "100.0", "0.42", "12.3", "nothing"):
        assert text in page
    if width == 120:
        assert page.count("method") == 1  # side by side


def test_markdown_latex_and_csv_carry_the_same_numbers():
    results = [*REFERENCES, make_row("iso_c", 0.6), make_row("average", 0.5), failed_row("a_b")]
    markdown, latex = writers.markdown(sheets(results)), writers.latex(sheets(results))
    table = {line["method"]: line for line in csv.DictReader(io.StringIO(writers.comma_separated(records(results))))}

    assert "| **63.5** | **67.9** |" in markdown and markdown.count("|\n") == 7
    assert r"\textbf{63.5} & \textbf{67.9} & 0.3" in latex and r"iso\_c &" in latex and r"\toprule" in latex
    assert float(table["iso_c"]["mean"]) == 63.5 and float(table["iso_c"]["norm"]) == pytest.approx(67.9, abs=0.05)
    assert table["iso_c"]["routing_accuracy"] == table["iso_c"]["energy"] == ""
    assert table["iso_c"]["adaptation"] == "none"
    assert table["a_b"]["status"] == "error" and table["a_b"]["error"] == "ValueError: rank 0"


def test_csv_tells_routing_and_energy():
    results = [routed_row(sure=sure, seed=seed, collapsed=["cars"]) for seed, sure in enumerate((0.9, 0.7))]
    (line,) = csv.DictReader(io.StringIO(writers.comma_separated(records(results))))
    assert float(line["routing_accuracy"]) == pytest.approx(83.5) and float(line["energy"]) == pytest.approx(60)
    assert float(line["routing_accuracy sd"]) == pytest.approx(100 * statistics.stdev([0.935, 0.735]), abs=1e-3)
    assert line["collapsed"] == "cars" and line["params"] == "100000" and line["router_seconds"] == "6.08"
    assert line["adaptation"] == "calibration"


def test_command_line(tmp_path, capsys):
    for row in REFERENCES:
        rows.write(row, tmp_path)
    main([str(tmp_path), "--format", "csv"])
    assert capsys.readouterr().out.count("\n") == 3

    (tmp_path / "empty").mkdir()
    for where in ("empty", "missing"):
        with pytest.raises(SystemExit, match=f"(?s)rows.*{where}"):
            main([str(tmp_path / where)])


def test_user_error_says_where_it_looked(tmp_path):
    from launchers.results.frame import rows_of

    with pytest.raises(UserError, match=str(tmp_path)):
        rows_of([str(tmp_path)])
