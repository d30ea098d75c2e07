"""No two cells train the same gates, and found gates give what training them again gives."""

import pytest
from console import by_method

from launchers import rows
from merging.fit.gates import Learned

FEW = "router.train.steps=5"  # the tests share a cache: each trains gates that no other one has


@pytest.fixture
def trainings(monkeypatch):
    """How often gates were trained."""
    seen, fit = [], Learned.fit

    def counted(self, *arguments):
        seen.append(self.name)
        return fit(self, *arguments)

    monkeypatch.setattr(Learned, "fit", counted)
    return seen


def test_the_test_split_is_scored_with_the_gates_of_the_choice(output, duet_here, trainings):
    for split in ("val", "test"):
        assert duet_here(output, "method=duet", FEW, f"split={split}")[0] == 0
    assert len(trainings) == 1
    chosen, found = sorted((row for row in rows.read(output / "results") if row.method == "duet"),
                           key=lambda row: row.config.get("split", "test") == "test")  # fmt: skip
    assert chosen.seconds["router"] == found.seconds["router"] > 0  # what training cost, whoever did it

    assert duet_here(output, "method=duet", FEW, "redo=true")[0] == 0
    again = by_method(output)["duet"]
    assert len(trainings) == 2 and again.run_id in (chosen.run_id, found.run_id)
    assert (again.accuracy, again.routing, again.collapsed) == (found.accuracy, found.routing, found.collapsed)


@pytest.mark.parametrize(("router", "times"), [("task_id_early", 1), ("twin", 1), ("task_id", 2)])
def test_gates_that_never_see_the_parts_are_shared_by_all_sizes_of_them(router, times, output, duet_here, trainings):
    status, _, errors = duet_here(output, "-m", "method=twin", "method.keep=0.1,0.2", f"router={router}", FEW)
    assert status == 0, errors
    assert len(trainings) == times
    shared = {row.run_id: row for row in rows.read(output / "results") if row.method == "twin"}
    assert len(shared) == 2

    assert duet_here(output, "-m", "method=twin", "method.keep=0.2", f"router={router}", FEW, "redo=true")[0] == 0
    alone = {row.run_id: row for row in rows.read(output / "results") if row.method == "twin"}
    assert {key: (row.accuracy, row.routing) for key, row in alone.items()} == {
        key: (row.accuracy, row.routing) for key, row in shared.items()
    }


def test_another_seed_shared_expert_or_loss_is_another_gate(output, duet_here, trainings):
    shared = ["method=twin", "router=task_id_early", "router.train.steps=6"]
    for other in ([], ["method@method.shared=average"], ["router.train.lr=0.01"], ["suite.sizes.calibration=6"]):
        before = len(trainings)
        assert duet_here(output, *shared, *other)[0] == 0
        assert len(trainings) == before + 1, other
