"""What the experts score on validation: computed once for all cells, and what a search tells of itself."""

from dataclasses import replace

from test_opened import CONFIG, computed, setup  # noqa: F401

from launchers.cell_cache import expert_scores
from launchers.cells import Cell
from launchers.results.frame import summarise
from launchers.results.notes import notes
from merging.fit.gates import Oracle
from merging.methods import Expert, TaskArithmetic, TsvM
from tasks.evaluate import Grid
from tasks.journal import NOWHERE
from tasks.scales import Search


def asked(setup, **changes):  # noqa: F811
    return expert_scores("val", replace(setup, **changes), NOWHERE)


def counted(monkeypatch):
    """Notes every split that is scored, and as what."""
    scored, plain = [], Grid.score
    monkeypatch.setattr(Grid, "score", lambda self, merged, split, *more, **named: scored.append(split) or plain(
        self, merged, split, *more, **named))  # fmt: skip
    return scored


def test_once_for_all_cells(setup, monkeypatch):  # noqa: F811
    scored = counted(monkeypatch)
    first = asked(setup)
    assert first == setup.grid.score(Expert()(setup.experts), "val").scores and scored == ["val"] * 2
    assert asked(setup) == first and len(scored) == 2
    assert asked(setup, gates=None) == first and len(scored) == 3  # redo=true


def test_a_row_says_what_was_searched(setup, monkeypatch):  # noqa: F811
    """The scale is that of the best mean share of the experts' accuracy, and the table says among how many."""
    scales, grid = [0.1, 0.4, 0.9], setup.grid
    row = computed(setup, TaskArithmetic(), scale=Search(scales))
    experts = grid.score(Expert()(setup.experts), "val").values
    scores = {s: grid.score(TaskArithmetic(s)(setup.experts), "val").values for s in scales}
    norms = {s: sum(each[task] / experts[task] for task in each) for s, each in scores.items()}
    assert row.scale == max(scales, key=lambda s: (round(norms[s], 9), -s)) and row.scale_source == "search:val"
    assert row.search == {"criterion": "norm", "scales": scales, "scored": 3}
    text = "picked by search on the val split (best norm of 3 scales from 0.1 to 0.9) for mine"
    assert any(text in note for note in notes(summarise([row])[0]))
    said = ["\n".join(notes(summarise([replace(row, scale=scale)])[0])) for scale in scales]
    assert ["may lie beyond (scale.scales): mine." in note for note in said] == [True, False, True]
    monkeypatch.setattr("tasks.scales.seconds", lambda grid, merged, split: 100.0)
    many = [round(0.1 * step, 1) for step in range(1, 31)]
    cell = Cell(
        "mine", TsvM(), Search(many, "mean"), Oracle(), CONFIG | {"method": "other", "scale": "searched"}, setup
    )
    row = cell.compute(lambda task, score: None)
    text = f"(best mean of {row.search['scored']} scored of 30 scales from 0.1 to 3: not of all)"
    assert row.search["scored"] < 30 and any(text in note for note in notes(summarise([row])[0]))
    older = replace(row, search={})
    assert any("picked by search on the val split for mine" in note for note in notes(summarise([older])[0]))
