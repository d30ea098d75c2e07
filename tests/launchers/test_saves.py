"""What a command writes beside its row: scores and the command in a folder's card, none of it in a file."""

import pytest
from hf_folders import written

from launchers.saves import Save
from merging import Experts, UserError, merge, open_merged
from merging.methods import Average
from tasks.score import Score


@pytest.fixture
def files(tmp_path):
    return [written(tmp_path / name, seed) / "model.safetensors" for seed, name in enumerate(("base", "a", "b"))]


def test_a_card_has_scores_and_protocol(files, tmp_path):
    merged = merge(Average(), files[0], files[1:], ["a", "b"])
    scores = {"a": Score("accuracy", 0.75, count=400, standard_error=0.0217)}
    save = Save(f"{tmp_path}/out/", command="duet method=average save=out/")
    card = (save.write(merged, scores, {"split": "val", "seed": 3}) / "README.md").read_text()
    assert "| a | accuracy | 0.7500 ± 0.0217 | 400 |" in card and "val split, seed 3;" in card
    assert "duet method=average save=out/" in card
    path = Save(f"{tmp_path}/out.safetensors", command="duet").write(merged, scores, {"split": "val"})
    assert not {"command", "scores", "split"} & open_merged(path).provenance.keys()


def test_what_cannot_be_saved_is_refused_before_a_merge(files, tmp_path):
    experts = Experts.open(files[0], files[1:])
    Save(f"{tmp_path}/out/").check(experts)
    with pytest.raises(UserError, match="is one of the inputs"):
        Save(f"{files[1].parent}/").check(experts)
    Save(f"{tmp_path}/other.safetensors").check(experts)
    with pytest.raises(UserError, match="is one of the inputs"):
        Save(str(files[2])).check(experts)
