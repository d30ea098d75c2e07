"""The base under linear probes is a reference beside base and experts."""

import math
import statistics

import pytest
from cells import TASKS, make_row, scores

from launchers.results.frame import summarise
from launchers.results.notes import notes
from launchers.results.table import columns


def test_a_probe_is_divided_by_the_experts_whatever_their_heads_but_only_if_these_are_known():
    heads = lambda name: {task: {"head": name} for task in TASKS}  # noqa: E731
    expert, probe = (
        make_row("expert", 0.8, contents=heads("own")),
        make_row("linear_probe", 0.4, contents=heads("probe")),
    )
    other = make_row("ties", 0.4, contents=heads("probe"))
    by_method = lambda rows: summarise(rows)[0].lines.set_index("method")["norm"]  # noqa: E731

    assert by_method([expert, probe])["linear_probe"] == pytest.approx(
        100 * statistics.fmean(probe.accuracy[task] / expert.accuracy[task] for task in TASKS)
    )
    assert math.isnan(by_method([expert, other])["ties"])
    second = make_row("expert", 0.9, contents=heads("others"), run_id="c0ffee00")
    assert math.isnan(by_method([expert, second, probe])["linear_probe"])


def test_a_probe_is_a_reference_and_its_labels_are_named():
    rows = [
        make_row("linear_probe", 0.7, needs="labels"),
        make_row("ties", 0.6),
        make_row("average", 0.5),
        make_row("expert", 0.9),
    ]
    (summary,) = summarise(rows)
    assert list(summary.lines["kind"]) == ["linear_probe", "static", "static", "expert"]
    (means,) = (column for column in columns(summary) if column.header == "mean")
    assert [cell.bold for cell in means.cells] == [label == "ties" for label in summary.lines["label"]]
    assert any(note.startswith("No merge, but linear heads on the base") for note in notes(summary))


def test_probes_of_merges_stand_in_a_column_of_their_own_only_where_there_are_any():
    expert, plain = make_row("expert", 0.8), make_row("average", 0.5)
    probed = make_row("ties", 0.6, probe=scores(dict.fromkeys(TASKS, 0.7)))
    (summary,) = summarise([expert, plain, probed])
    expected = 100 * statistics.fmean(0.7 / expert.accuracy[task] for task in TASKS)
    assert summary.lines.set_index("method")["probe"]["ties"] == pytest.approx(expected)
    (column,) = (column for column in columns(summary) if column.header == "probe")
    assert [cell.text for cell in column.cells] == ["-", f"{expected:.1f}", "-"] and not any(
        c.bold for c in column.cells
    )
    assert any(note.startswith("probe: norm of a static merge under linear heads") for note in notes(summary))
    (without,) = summarise([expert, plain])
    assert "probe" not in [column.header for column in columns(without)]
    assert not any(note.startswith("probe:") for note in notes(without))
