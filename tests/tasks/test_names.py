"""Names in the mappings of suite.sources that nothing would read are told."""

import pytest

from merging.errors import UserError
from tasks.vision.data import Store
from tasks.vision.suite import build


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "images"), str(tmp_path / "cache"), 1)


def test_a_misspelt_task_in_sources_is_told(tmp_path, store, caplog):
    """Otherwise the images would come from the published copy."""
    caplog.set_level("INFO")
    sources = {"eurosat": {"folder": str(tmp_path)}, "birds": {"folder": str(tmp_path)}}
    with pytest.raises(UserError, match=r"suite\.sources\.eurosat is read by no task: there is EuroSAT, and no e"):
        build("mine", ["EuroSAT"], store, "clip_vit_b32", sources=sources)
    build("mine", ["MNIST", "birds"], store, "clip_vit_b32", sources=sources)
    assert "suite.sources: suite.tasks leaves out eurosat" in caplog.text


def test_parquet_files_that_no_part_reads_are_told(store):
    def birds(**knobs):
        build("mine", None, store, "clip_vit_b32", sources={"birds": {"parquet": {"train": "a", "tets": "b"}, **knobs}})

    birds(test="tets")
    with pytest.raises(UserError, match=r"suite\.sources\.birds\.parquet has tets, from which nothing is read\. Call "):
        birds()
