"""What a command writes beside its row: scores and the command in a folder's card, none of it in a file."""

import pytest
from hf_folders import written
from huggingface_hub import HfApi

from launchers.saves import Save, check_push
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
    Save(f"{tmp_path}/out/").check(experts, Average())
    with pytest.raises(UserError, match="is one of the inputs"):
        Save(f"{files[1].parent}/").check(experts, Average())
    Save(f"{tmp_path}/other.safetensors").check(experts, Average())
    with pytest.raises(UserError, match="is one of the inputs"):
        Save(str(files[2])).check(experts, Average())


class TestPush:
    """To a Hub that is replaced by a list of what it is asked."""

    @pytest.fixture
    def asked(self, monkeypatch):
        calls: list = []
        monkeypatch.setenv("HF_TOKEN", "hf_made_up")
        monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: calls.append((name, options)))
        monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.append(options))
        return calls

    def test_the_folder_is_uploaded_as_a_private_model(self, files, tmp_path, asked):
        Save(f"{tmp_path}/out/", push="user/merged").write(merge(Average(), files[0], files[1:]))
        (name, options), upload = asked
        assert (name, options) == ("user/merged", {"private": True, "exist_ok": True})
        assert upload["repo_id"] == "user/merged" and (upload["folder_path"] / "model.safetensors").exists()

    def test_what_the_hub_refuses_is_said_and_the_folder_stays(self, files, tmp_path, asked, monkeypatch):
        def refuse(self, **options):
            raise OSError("403 Forbidden")

        monkeypatch.setattr(HfApi, "upload_folder", refuse)
        with pytest.raises(
            UserError, match=r"is saved and was not uploaded to user/merged: 403 .* hf upload user/merged"
        ):
            Save(f"{tmp_path}/out/", push="user/merged").write(merge(Average(), files[0], files[1:]))
        assert (tmp_path / "out" / "model.safetensors").exists()

    def test_what_cannot_be_uploaded_is_refused_first(self, asked, monkeypatch):
        check_push("user/merged", "out/")
        for repository, path, message in (
            ("user/merged", None, "save=None names none"),
            ("user/merged", "out.safetensors", "uploads a folder"),
            ("a/b/c", "out/", "no name of a model"),
        ):
            with pytest.raises(UserError, match=message):
                check_push(repository, path)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        with pytest.raises(UserError, match="needs a token of the Hugging Face Hub that may write, and there is none"):
            check_push("user/merged", "out/")
        assert not asked
