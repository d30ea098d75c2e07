"""A comparison with published numbers never claims more than it may, and prints all of it."""

import csv
import io
from dataclasses import replace

import pytest
from cells import failed_row, make_row, routed_row, scores
from repeated import KNOWN, SEARCH, SUITES, measured, names, published_row

from launchers import rows, table
from launchers.results import against, writers
from launchers.results.against import compare


def compared(there, *rows):
    """The comparison of the one line that these rows make with the row of a published table."""
    comparisons = compare(rows)
    assert all(comparison.line["n"] == len(rows) for comparison in comparisons)
    (comparison,) = (comparison for comparison in comparisons if comparison.published.table == there.table)
    return comparison


WITH_CELLS = [row for row in KNOWN if row.accuracy]


@pytest.mark.parametrize("there", WITH_CELLS, ids=names)
def test_a_repetition_is_within_and_a_worse_one_is_outside(there):
    if "unknown" in there.settings.values():
        never = compared(there, measured(there))
        assert never.gaps["mean"] == pytest.approx(0, abs=1e-9) and never.reasons and not never.within
        return
    exact = compared(there, measured(there))
    assert exact.published.printed == there.printed and exact.reasons == () and exact.within
    assert exact.gaps["mean"] == pytest.approx(0, abs=1e-9)

    assert len(exact.published.accuracy) == len(there.accuracy)
    for off in (0.9, -0.9):
        assert moved(exact, off * there.tolerance).within
    for off in (1.1, -1.1):
        worse = moved(exact, off * there.tolerance)
        assert not worse.reasons and not worse.within
        assert worse.gaps["mean"] == pytest.approx(off * there.tolerance)


def moved(exact, points):
    """The comparison of a line that is `points` better on every task."""
    return replace(exact, measured={name: value + points for name, value in exact.measured.items()})


def test_measured_scores_move_a_comparison_by_as_much():
    worse = compared(TA, measured(TA, 1.1 * TA.tolerance))
    assert not worse.reasons and not worse.within and len(worse.published.accuracy) == len(TA.accuracy)
    assert worse.gaps["mean"] == pytest.approx(1.1 * TA.tolerance)
    assert compared(TA, measured(TA, 0.9 * TA.tolerance)).within


TA = published_row("RankOne-MoE logs", "task_arithmetic")
WEMOE = published_row("RankOne-MoE logs", "wemoe")
RELEASED = published_row("WEMoE logs", "wemoe", printed="WEMoE router lr=1e-4, step 1000")
EMR, SMILE = published_row("EMR logs", "emr"), published_row("fusion_bench SMILE", "smile", printed="gate_k=16 k=128")
TSV = published_row("TSV logs", "tsv_m")
TWIN, DUET = published_row("Twin-Merging, Table 3", "twin"), published_row("DuetMerging, Table 1", "duet")


@pytest.mark.parametrize(("there", "changes", "said"), [
    (TA, {"family": "task_vectors"}, "experts of hub_a there, of task_vectors here"),
    (TA, {"config": {"suite.variant": "tall_masks"}}, "prompts and test sets of fusion_bench there, of tall_masks"),
    (TA, {"config": {"suite.variant": None}}, "an unknown code base here"),
    (TA, {"scale": 0.4}, "scale 0.3 fixed / 0.4 fixed"),
    (TA, {"scale_source": "search:val"}, "scale 0.3 fixed / 0.3 tuned on validation"),
    (TA, {"adaptation": "test"}, "adaptation none / test"),
    (TA, {"router": "oracle"}, "router none / oracle"),
    (TSV, {"scale_source": "fixed", "scale": 1.0}, "scale tuned on validation / 1 fixed"),
    (TSV, {"search": SEARCH | {"criterion": "mean"}}, "search.criterion norm / mean"),
    (TSV, {"search": SEARCH | {"scales": [0.1, 1.0]}}, "search.scales 30 from 0.1 to 3 / 2 from 0.1 to 1"),
    (TSV, {"search": SEARCH | {"scored": 14}}, "all scales scored / 14 of 30"),
    (TSV, {"search": {}}, "search.criterion norm / not set"),
    (EMR, {"router": "task_id"}, "router oracle / task_id"),
    (SMILE, {"granularity": "sample", "router": "oracle"}, "router subspace / oracle, granularity token / sample"),
    (WEMOE, {"router": "oracle", "adaptation": "none", "granularity": "sample"},
     "router entropy / oracle, adaptation test / none, granularity batch / sample"),
    (WEMOE, {"router": "task_id"}, "router entropy / task_id"),
    (WEMOE, {"config": {"engine.batch": 100}}, "engine.batch 128 / 100"),
    (WEMOE, {"config": {"router.gate.standardise": True}}, "router.gate.standardise False / True"),
    (WEMOE, {"config": {"router.train.schedule": "cosine"}}, "router.train.schedule constant / cosine"),
    (RELEASED, {"granularity": "batch"}, "granularity sample / batch"),
    (RELEASED, {"adaptation": "calibration"}, "adaptation test / calibration"),
    (TWIN, {"router": "oracle"}, "router task_id / oracle"),
    (TWIN, {"adaptation": "test"}, "adaptation calibration / test"),
    (TWIN, {"granularity": "group"}, "granularity sample / group"),
    (TWIN, {"config": {"method.start": 0}}, "method.start not set / 0"),
    (TWIN, {}, "scale unknown / 0.3 fixed"),
    (DUET, {}, "adaptation unknown / none, granularity unknown / sample"),
    (DUET, {"router": "oracle"}, "router entropy / oracle"),
    (TA, {"config": {"engine.precision": "bf16"}}, "precision fp32 / bf16"),
    (WEMOE, {"granularity": "sample"}, "granularity batch / sample"),
    (WEMOE, {"adaptation": "calibration"}, "adaptation test / calibration"),
    (WEMOE, {"config": {"router.gate.depth": 1}}, "router.gate.depth 2 / 1"),
    (WEMOE, {"config": {"method.density": None}}, "method.density 1 / not set"),
])  # fmt: skip
def test_another_experiment_is_never_a_repetition(there, changes, said):
    told = {"granularity": "sample"} if there is DUET else {}
    comparison = compared(there, measured(there, **(told | changes)))
    assert not comparison.within and comparison.reasons
    assert any(said in reason for reason in comparison.reasons), comparison.reasons
    assert there.accuracy == {} or comparison.gaps["mean"] == pytest.approx(0, abs=1e-9)  # shown all the same


def learning(warm_up=None, **weights):
    objectives = {name: {"weight": weight} for name, weight in weights.items()}
    return {"_target_": "merging.fit.gates.Gradient", "objectives": objectives, "warm_up": warm_up}


@pytest.mark.parametrize(("train", "told"), [
    (learning(entropy=1.0, marginal=0.0), None),
    (learning(entropy=1.0, marginal=0.5), "router entropy / entropy + marginal"),
    (learning(entropy=0.0, distillation=10.0), "router entropy / distillation"),
    (learning({"_target_": "merging.fit.gates.TaskId"}, entropy=1.0), "router entropy / task_id + entropy"),
    ({"_target_": "merging.fit.gates.TaskId"}, "router entropy / task_id"),
])  # fmt: skip
def test_gates_are_compared_by_what_they_learned_from_and_not_by_their_name(train, told):
    row = measured(WEMOE, router="my_gates", config={f"router.train.{name}": value for name, value in train.items()})
    reasons = compared(WEMOE, row).reasons
    assert reasons == () if told is None else any(told in reason for reason in reasons)


def test_a_preset_is_compared_with_the_method_that_it_is():
    row = replace(measured(SMILE), method="smile_128")
    comparison = compared(SMILE, row)
    assert comparison.within and comparison.published.printed == "gate_k=16 k=128"
    fewer = replace(row, config=measured(SMILE, config={"method.rank": 32}).config)
    comparison = compared(SMILE, fewer)
    assert comparison.published.printed == "gate_k=16 k=32" and not comparison.within


def test_a_family_goes_by_its_other_name_too():
    assert compared(TA, measured(TA, family="hf_tanganke")).within
    assert compared(TA, measured(TA, family="task_vectors")).reasons


def test_other_test_images_are_named():
    row = measured(TA)
    sizes = {"EuroSAT": {"size": 5400}, "SUN397": {"name": "val"}}
    splits = {task: {**split, **sizes.get(task, {})} for task, split in row.splits.items()}
    comparison = compared(TA, replace(row, splits=splits))
    assert comparison.reasons == (
        "scored on the val split here",
        "other test samples (there / here): EuroSAT 2700 / 5400",
    )
    assert not comparison.within


def test_a_trial_run_on_a_few_images_is_none_where_the_published_number_of_images_is_unknown_too():
    there = published_row("Twin-Merging, Table 3", "average")
    assert there.test_images == {} and not compared(there, measured(there)).reasons
    comparison = compared(there, measured(there, config={"suite.limit": 100}))
    assert comparison.reasons == ("at most 100 samples per split here",) and comparison.reasons


def test_a_scale_tuned_there_must_be_tuned_here():
    there = published_row("TSV logs", "tsv_m")
    assert compared(there, measured(there, scale_source="fixed")).reasons
    assert not compared(there, measured(there, scale_source="search:val")).reasons


def test_an_equal_mean_of_unequal_tasks_is_outside():
    row = measured(TA)
    shares = {**row.accuracy, "Cars": row.accuracy["Cars"] + 0.05, "DTD": row.accuracy["DTD"] - 0.05}
    comparison = compared(TA, replace(row, scores=scores(shares)))
    assert not comparison.reasons and comparison.gaps["mean"] == pytest.approx(0, abs=1e-9) and not comparison.within


def test_seeds_are_averaged_and_one_odd_seed_is_told():
    seeds = [measured(TA, off, seed=seed) for seed, off in enumerate((-1.0, 1.0))]
    comparison = compared(TA, *seeds)
    assert comparison.within

    odd = compared(TA, seeds[0], replace(seeds[1], scale=0.5))
    assert odd.reasons == ("other settings (there / here): scale 0.3 fixed / 0.5 fixed",)


def test_the_nearest_row_of_a_sweep_is_shown():
    for scale, printed in ((0.3, "0.3"), (0.41, "0.4"), (0.9, "1.0")):
        there = published_row("subspace_fusion sweep", "task_arithmetic", printed=f"Task Arithmetic lambda={printed}")
        assert compared(there, measured(there, scale=scale)).published == there


def test_references_count_on_a_part_of_the_tasks_and_merges_do_not():
    twenty = published_row("OPCM logs", "expert", suite="clip20")
    assert compared(twenty, measured(twenty, suite="clip14")).within
    part = measured(twenty, tasks=["Cars", "DTD"], accuracy={"Cars": 0.78523, "DTD": 0.79681})
    comparison = compared(twenty, part)
    assert (
        comparison.within
        and set(comparison.published.accuracy) == {"Cars", "DTD"}
        and comparison.published.mean == 79.102
    )

    merged = measured(TA, tasks=["Cars", "DTD"])
    assert [comparison.published for comparison in compare([merged])] == [None]
    assert not compared(TA, measured(TA)).reasons and not [
        comparison for comparison in compare([measured(TA, suite="clip14")]) if comparison.published == TA
    ]


def test_a_normalised_score_is_compared_where_only_that_is_published():
    there = published_row("Twin-Merging, Table 3", "average")
    expert = published_row("subspace_fusion experts", "expert")
    scores = {task: 0.723 * value / 100 for task, value in expert.accuracy.items()}
    row = measured(there, accuracy=scores, splits={})
    comparisons = compare([row, replace(measured(expert), checkpoints=row.checkpoints, splits={})])
    (comparison,) = (comparison for comparison in comparisons if comparison.published == there)
    assert (
        set(comparison.gaps) == {"norm"} and comparison.gaps["norm"] == pytest.approx(0, abs=1e-9) and comparison.within
    )


BASE = published_row("OPCM logs", "base", suite="clip20")
RESULTS = [
    measured(BASE, suite="clip8"), measured(TA, 0.05), measured(published_row("RankOne-MoE logs", "ties"), -0.4),
    measured(WEMOE, make=routed_row, adaptation="calibration"), make_row("own_idea", suite="clip8",
    tasks=list(SUITES["clip8"])), measured(published_row("OPCM logs", "expert", suite="clip20"), suite="clip8"),
    measured(BASE), failed_row("iso_c", suite="clip8", tasks=list(SUITES["clip8"])),
]  # fmt: skip


def test_the_terminal_page_fits_and_says_everything():
    page = writers.terminal(against.sheets(RESULTS), 118)
    assert max(map(len, page.splitlines())) <= 118
    one, backbone, twenty = page.split("against published numbers")[1:]
    flat = " ".join(one.split())
    assert "within 0.1" in flat and "outside 0.2" in flat and "differs [" in flat and TA.source in flat
    assert "Nothing published for own_idea." in backbone and "Failed, nothing to compare: iso_c." in backbone
    assert "other settings (there / here): adaptation test / calibration" in flat
    assert all(task in twenty for task in ("SUN397", "KMNIST", "RenderedSST2"))


def test_every_footnote_mark_has_its_text_and_every_text_its_mark():
    for page in against.sheets(RESULTS):
        verdicts = " ".join(cell.text for cell in page.columns[-1].cells)
        marks = {int(mark) for part in verdicts.split("[")[1:] for mark in part.split("]")[0].split()}
        assert marks == {int(text[1:].split("]")[0]) for text in page.notes if text.startswith("[")}


def test_the_printed_difference_is_measured_minus_published():
    page = next(page for page in against.sheets(RESULTS) if len(page.dim) > 2)
    head, *body = list(zip(*([column.header, *(cell.text for cell in column.cells)] for column in page.columns),
                           strict=True))  # fmt: skip
    own, known = None, None
    for line in body:
        cells = dict(zip(head, line, strict=True))
        if not cells["method"].startswith(" "):
            own = cells
        elif "difference" not in cells["method"]:
            known = cells
        else:
            assert own is not None and known is not None
            for name in (*SUITES["clip8"], "mean"):
                assert (cells[name] == "-") == (known[name] == "-")
                if cells[name] != "-":
                    assert float(cells[name]) == pytest.approx(float(own[name]) - float(known[name]), abs=0.1001)


def test_the_other_formats_hold_the_same_lines():
    sheets = against.sheets(RESULTS)
    lines = list(csv.DictReader(io.StringIO(writers.comma_separated(writers.frame_of(sheets)))))
    assert len(lines) == sum(len(sheet.lines) for sheet in sheets)
    markdown, latex = writers.markdown(sheets), writers.latex(sheets)
    assert markdown.count("**within 0.1**") == latex.count(r"\textbf{within 0.1}") > 0
    differences = sum(line["method"] == "difference" for line in lines)
    assert markdown.count("difference |") == latex.count("difference &") == differences > 0
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 2 and "task_a" not in latex
    width = {line.count("|") for line in markdown.split("\n\n")[1].splitlines()}
    assert len(width) == 1


def test_nothing_published_is_one_line():
    page = writers.terminal(against.sheets([make_row("ties"), make_row("base", 0.3)]))
    assert "mini8, unknown (mini8), against published numbers" in page
    assert page.strip().splitlines()[-1] == "Nothing published for base, ties."
    assert all(write(against.sheets([make_row("ties")])) for write in writers.FORMATS.values())


def test_the_command_line(tmp_path, capsys):
    for row in RESULTS:
        rows.write(row, tmp_path)
    table.main([str(tmp_path), "--against", "published", "--format", "markdown"])
    assert "**within 0.1**" in capsys.readouterr().out
    table.main([str(tmp_path), "--against", "published"])
    assert "within 0.1" in capsys.readouterr().out
    table.main([str(tmp_path)])
    assert "against" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        table.main([str(tmp_path), "--against", "memory"])
