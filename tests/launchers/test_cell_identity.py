"""A cell's name follows what computes its numbers, and not how or where."""

from dataclasses import replace

from test_opened import CONFIG, learned, setup  # noqa: F401

from launchers.cells import Cell
from merging.fit.gates import Oracle
from merging.methods import TaskArithmetic, Ties, Twin
from tasks.engine import Engine
from tasks.evaluate import Grid
from tasks.mini.experts import FineTuned
from tasks.scales import Fixed, Search
from tasks.vision.folder import Folder


def named(setup, method, router=None, scale=None, source=None, engine=None, **config):  # noqa: F811
    grid = setup.grid if engine is None else Grid(setup.grid.suite, setup.grid.backbone, engine)
    setup = replace(setup, grid=grid, source=source or setup.source)
    return Cell("mine", method, scale or Fixed(), router or Oracle(), CONFIG | config, setup).run_id


def test_what_computes_the_numbers_counts(setup):  # noqa: F811
    names = [
        named(setup, Ties()),
        named(setup, Ties(density=0.3)),
        named(setup, TaskArithmetic()),
        named(setup, Ties(), scale=Search([0.1, 0.3])),
        named(setup, Ties(), seed=1),
        named(setup, Ties(), split="val"),
        named(setup, Ties(), save_dtype="bf16"),
        named(setup, Ties(), engine=Engine("cpu", "bf16")),
        named(setup, Ties(), source=Folder("base.pt")),
        named(setup, Ties(), source=Folder("base.pt", qkv="separate")),
    ]
    assert len({*names}) == len(names) and all(len(name) == 12 and int(name, 16) >= 0 for name in names)


def test_where_it_runs_and_where_files_lie_does_not(setup):  # noqa: F811
    assert named(setup, Ties()) == named(setup, Ties(), engine=Engine("auto")) == named(setup, Ties())
    places = [Folder("a.pt"), Folder("b.pt", "{task}.pt", {"one": "c.pt"}, multitask="d.pt")]
    workers = [FineTuned(), FineTuned(workers=3)]
    for same in (places, workers):
        assert len({named(setup, Ties(), source=source) for source in same}) == 1


def test_the_batch_counts_where_samples_are_routed_together(setup):  # noqa: F811
    def names(granularity):
        router = learned()
        router = replace(router, gate=replace(router.gate, granularity=granularity))
        return {named(setup, Twin(), router, engine=Engine("cpu", batch=batch)) for batch in (10, 20)}

    assert len(names("sample")) == 1 and len(names("batch")) == 2
