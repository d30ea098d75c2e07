"""A merge saved as a folder: plain transformers loads it and answers as the merge does; bad input leaves nothing."""

import errno
import os
import shutil

import pytest
import torch
from hf_folders import BERT, IDS, json_of, logits, written
from safetensors import safe_open

from merging import UserError, files, load, merge, open_merged, saving_folder
from merging.methods import Average, Emr, Quantised, TaskArithmetic, Ties, Twin

transformers = pytest.importorskip("transformers")


@pytest.fixture
def llamas(tmp_path):
    """A base and two experts, by name."""
    return {name: written(tmp_path / name, seed) for seed, name in enumerate(("base", "math", "code"))}


def weights(folder):
    return folder / "model.safetensors"


def merged_of(folders, method=None):
    base, *experts = folders.values()
    names = list(folders)[1:]
    return merge(method or TaskArithmetic(0.4), weights(base), list(map(weights, experts)), names)


def loaded(folder, kind="AutoModelForCausalLM"):
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


def filled(folder, merged, w=None):
    """The base's module with the merged weights, set by hand."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict(dict(merged.state(w)), strict=False)
    return model.eval()


@pytest.mark.parametrize(
    "method", [TaskArithmetic(0.4, kinds={"all": [0.1, 0.9]}), Ties(), Average(), Quantised(group=4)]
)
def test_transformers_loads_the_merge(llamas, tmp_path, method):
    merged = merged_of(llamas, method)
    folder = merged.save(f"{tmp_path}/out/")
    expected = logits(filled(llamas["base"], merged))
    assert torch.equal(logits(loaded(folder)), expected)
    assert torch.equal(logits(load(folder)), expected)
    again = open_merged(folder)
    assert again.provenance["experts"] == [checkpoint.id for checkpoint in merged.inputs]
    assert all(torch.equal(again.weight(key), merged.weight(key)) for key in merged.specs)
    assert transformers.AutoTokenizer.from_pretrained(folder)("a b").input_ids == [3, 4]


def test_shards_have_an_index_and_at_most_their_size(llamas, tmp_path):
    whole, parts = (merged_of(llamas).save(tmp_path / name, **more) for name, more in SHARDED(tmp_path))
    index = json_of(parts / "model.safetensors.index.json")
    shards = sorted(parts.glob("model-*.safetensors"))
    assert len(shards) > 2 and {path.name for path in shards} == {*index["weight_map"].values()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in loaded(parts).state_dict().values())
    for path in shards:
        with safe_open(path, "pt") as file:
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= 1000 or len(sizes) == 1
    assert torch.equal(logits(loaded(parts)), logits(loaded(whole)))
    assert not (whole / "model.safetensors.index.json").exists()


def SHARDED(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()  # a folder that is there and empty needs no stroke behind it
    return ("whole", {}), ("parts", {"shard_gb": 1e-6})


def test_dtype_is_kept_and_said(tmp_path):
    folders = {
        name: written(tmp_path / name, seed, dtype=torch.bfloat16) for seed, name in enumerate(("base", "a", "b"))
    }
    folder = merged_of(folders).save(f"{tmp_path}/out/")
    assert loaded(folder).dtype == torch.bfloat16 and json_of(folder / "config.json")["dtype"] == "bfloat16"
    wide = merged_of(folders).save(f"{tmp_path}/wide/", dtype="fp32")
    assert transformers.AutoModelForCausalLM.from_pretrained(wide, dtype="auto").dtype == torch.float32


def test_tied_weights_are_written_once(tmp_path):
    folders = {
        name: written(tmp_path / name, seed, tie_word_embeddings=True) for seed, name in enumerate(("base", "a"))
    }
    for name, folder in folders.items():  # as files of old hold them, under both names
        with safe_open(weights(folder), "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        torch.save(state, folder / "both.bin")
        folders[name] = folder
    base, expert = (folder / "both.bin" for folder in folders.values())
    merged = merge(TaskArithmetic(0.4), base, [expert])
    folder = merged.save(f"{tmp_path}/out/")
    with safe_open(weights(folder), "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    model = loaded(folder)
    assert torch.equal(model.lm_head.weight, merged.weight("model.embed_tokens.weight"))


def test_a_routed_merge_keeps_its_deltas_beside(llamas, tmp_path):
    merged = merged_of(llamas, Emr())
    folder = merged.save(f"{tmp_path}/out/", shard_gb=1e-6)
    again = open_merged(folder)
    assert again.deltas.keys() == merged.deltas.keys() and again.routing == merged.routing
    model = load(folder)
    for task in range(2):
        w = torch.eye(2)[task]
        expected = filled(llamas["base"], merged, w)
        with torch.inference_mode():
            found = model(input_ids=torch.tensor(IDS), w=w).logits
        assert torch.allclose(found, logits(expected), atol=1e-5)


class TestHeads:
    def made(self, tmp_path, *labels):
        kind = "BertForSequenceClassification"
        folders = {"base": written(tmp_path / "base", 0, "BertModel", **BERT)}
        for seed, names in enumerate(labels, 1):
            options = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
            folders[f"task{seed}"] = written(tmp_path / f"task{seed}", seed, kind, **BERT, **options)
        with safe_open(weights(folders["base"]), "pt") as file:
            state = {f"bert.{key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        torch.save(state, folders["base"] / "prefixed.bin")
        base, *experts = folders.values()
        return merge(Average(), base / "prefixed.bin", list(map(weights, experts)), list(folders)[1:]), folders

    def test_several_lie_beside(self, tmp_path):
        merged, _ = self.made(tmp_path, ["no", "yes"], ["x", "y", "z"])
        folder = merged.save(f"{tmp_path}/out/")
        for task, head in merged.heads.items():
            with safe_open(folder / "heads" / f"{task}.safetensors", "pt") as file:
                assert all(torch.equal(file.get_tensor(key), tensor) for key, tensor in head.items())
        assert loaded(folder, "AutoModel").config.model_type == "bert"
        assert open_merged(folder).heads.keys() == merged.heads.keys()

    def test_a_single_one_lies_inside_with_its_labels(self, tmp_path):
        merged, folders = self.made(tmp_path, ["no", "yes"])
        folder = merged.save(f"{tmp_path}/out/")
        model = loaded(folder, "AutoModelForSequenceClassification")
        assert model.config.id2label == {0: "no", 1: "yes"}
        again = open_merged(folder)
        assert [*again.specs] == [*merged.specs] and again.heads.keys() == {"task1"}
        expected = loaded(folders["task1"], "AutoModelForSequenceClassification")  # of one expert the mean is itself
        assert torch.allclose(logits(model), logits(expected), atol=1e-6)


class TestCard:
    def test_it_says_what_the_merge_is(self, llamas, tmp_path):
        score = {"metric": "accuracy", "value": 0.5, "standard_error": 0.05, "count": 100}
        facts = {"scores": {"math": score}, "split": "test", "seed": 0, "command": "duet method=ties"}
        merged = merged_of(llamas, Ties(0.3))
        card = (merged.save(f"{tmp_path}/out/", **facts) / "README.md").read_text()
        for part in ("A merge of 2 models fine-tuned from base, by Ties at the coefficient 0.3.", "density: 0.3",
                     f"| math | math | {merged.inputs[0].id[:12]} |", "| math | accuracy | 0.5000 ± 0.0500 | 100 |",
                     "duet method=ties", 'AutoModelForCausalLM.from_pretrained("out")', "Licence:"):  # fmt: skip
            assert part in card
        assert str(tmp_path) not in card

    def test_its_python_runs(self, llamas, tmp_path, monkeypatch):
        card = (merged_of(llamas).save(f"{tmp_path}/out/") / "README.md").read_text()
        monkeypatch.chdir(tmp_path)
        names: dict = {}
        exec(card.partition("```python\n")[2].partition("```")[0], names)
        assert names["model"].config.model_type == "llama"

    def test_without_a_router_it_says_how_weights_are_given(self, llamas, tmp_path, monkeypatch):
        card = (merged_of(llamas, Twin(keep=1.0)).save(f"{tmp_path}/out/") / "README.md").read_text()
        assert "(no router was trained)" in card and "kinds" not in card and card.endswith("\n")
        monkeypatch.chdir(tmp_path)
        names = {"inputs": {"input_ids": torch.tensor(IDS)}}
        exec(card.partition("```python\n")[2].partition("```")[0], names)
        expected = names["model"](**names["inputs"], w=torch.eye(2)[0]).logits
        assert torch.equal(names["output"].logits, expected)


class TestBadInput:
    def test_a_disk_that_fills_while_the_third_shard_is_written(self, llamas, tmp_path, monkeypatch):
        (tmp_path / "new").mkdir()
        honest = files._locked

        def locked(partial, flags):
            if "model-00003" in str(partial):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return honest(partial, flags)

        monkeypatch.setattr(files, "_locked", locked)
        target = tmp_path / "new" / "out"
        with pytest.raises(
            UserError, match=rf"Cannot write {target}/model-00003-of-\d+\.safetensors: No space left on "
        ):
            merged_of(llamas).save(f"{target}/", shard_gb=1e-6)
        assert not list((tmp_path / "new").iterdir())

    def test_a_disk_that_is_too_small(self, llamas, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        with pytest.raises(UserError, match=r"out/? takes 0\.00 GB, and .* has 0\.00 GB free"):
            merged_of(llamas).save(f"{tmp_path}/out/")

    def test_a_folder_with_other_things(self, llamas, tmp_path):
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.tex").touch()
        with pytest.raises(UserError, match=r"home holds other files, which a merged model would replace"):
            merged_of(llamas).save(tmp_path / "home")
        with pytest.raises(UserError, match="is one of the inputs"):
            merged_of(llamas).save(llamas["math"])
        assert (tmp_path / "home" / "thesis.tex").exists()

    def test_an_older_merge_is_replaced_whole(self, llamas, tmp_path):
        merged_of(llamas).save(f"{tmp_path}/out/", shard_gb=1e-6)
        merged = merged_of(llamas, Average())
        folder = merged.save(f"{tmp_path}/out/")
        assert not list(folder.glob("model-*")) and not [path for path in tmp_path.iterdir() if path.name[0] == "."]
        assert torch.equal(logits(loaded(folder)), logits(filled(llamas["base"], merged)))

    def test_what_a_killed_writer_left_is_removed(self, llamas, tmp_path):
        (tmp_path / ".out.1.1").mkdir()
        (tmp_path / ".out.1.1" / "model-00001-of-00009.safetensors").touch()
        merged_of(llamas).save(f"{tmp_path}/out/")
        assert not (tmp_path / ".out.1.1").exists()

    def test_a_base_that_is_no_folder(self, tmp_path):
        state = {"w": torch.zeros(2)}
        with pytest.raises(UserError, match=r"is none: no config.json with a model_type .*out\.safetensors"):
            merge(Average(), state, [state]).save(f"{tmp_path}/out/")
        with pytest.raises(UserError, match="was not written by this library: it has no duet"):
            (tmp_path / "empty").mkdir()
            open_merged(tmp_path / "empty")

    def test_names_of_open_clip(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "clip"}')
        torch.save({"visual.proj": torch.zeros(2)}, tmp_path / "clip.bin")
        with pytest.raises(UserError, match="have open_clip's names"):
            merge(Average(), tmp_path / "clip.bin", [{"visual.proj": torch.ones(2)}]).save(f"{tmp_path}/out/")

    def test_configurations_that_differ_are_told(self, tmp_path, caplog):
        folders = {name: written(tmp_path / name, seed, rms_norm_eps=10.0 ** -(5 + seed)) for seed, name in
                   enumerate(("base", "a"))}  # fmt: skip
        folder = merged_of(folders).save(f"{tmp_path}/out/")
        assert "config.json of a has rms_norm_eps 1e-06 instead of 1e-05; the base's is kept" in caplog.text
        assert "rms_norm_eps 1e-06 instead of 1e-05" in (folder / "README.md").read_text()

    def test_shards_of_no_size(self, llamas, tmp_path):
        with pytest.raises(UserError, match="shard_gb=0 is out of range"):
            saving_folder.write(merged_of(llamas), tmp_path / "out", 0)
