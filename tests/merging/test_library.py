"""merging as a library: merge, save, load, run."""

import json
from hashlib import sha256
from threading import Event, current_thread, main_thread
from threading import enumerate as threads

import pytest
import torch
from safetensors import safe_open
from samples import asks, drawn, equal, every_method, models, quick
from torch import nn

from merging import UserError, api, files, load, merge, open_merged
from merging.api import describe
from merging.backbones.open_clip import OpenClip
from merging.checkpoints import identify_ahead
from merging.methods import Average, Dare, TaskArithmetic, Ties, Twin, discovered

BACKBONE = OpenClip("tiny", 8, {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2})
INPUTS = drawn(3, 6)
BY_TASK = (
    "Expert",
    "Emr",
    "TallMask",
    "TsvCompress",
    "TSwitch",
    "Multitask",
    "Rmm",
)  # of which no single model is merged
PLAIN = [
    each
    for each in every_method()
    if each.__name__ not in BY_TASK and each().needs == "nothing" and not asks(quick(each))
]
FILES = [pytest.param(quick(each), id=each.__name__) for each in PLAIN]


def network(seed=0):
    """A network with fused and plain matrices, norms, a buffer of floats and one of integers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.GELU(), nn.Linear(12, 5, bias=False)).eval()


def tuned(count=3):
    """State dicts of a base and of experts around it."""
    base = network().state_dict()
    others = [network(1 + seed).state_dict() for seed in range(count)]
    return base, [{key: (0.7 * base[key] + 0.3 * other[key]).to(base[key].dtype) for key in base} for other in others]


@pytest.mark.parametrize("method", FILES)
@pytest.mark.parametrize("from_files", [False, True])
def test_merge_save_load_run(method, from_files, tmp_path, stored):
    base, *experts = (stored(state) if from_files else state for state in (tuned()[0], *tuned()[1]))
    merged = merge(method, base, experts)
    model = load(merged.save(tmp_path / "merged.safetensors"), network())
    reference = network()
    reference.load_state_dict(models(merged)[0], strict=False)
    assert not model.training and torch.equal(model(INPUTS), reference(INPUTS))
    assert torch.equal(model[1].num_batches_tracked, network()[1].num_batches_tracked)


def test_a_loaded_model_does_not_hang_on_its_file(tmp_path):
    path = merge(Average(), *tuned()).save(tmp_path / "merged.safetensors")
    model, before = load(path, network()), path.read_bytes()
    expected = model(INPUTS)
    with torch.no_grad():
        model[0].weight.add_(0.0)
    path.write_bytes(bytes(len(before)))
    assert torch.equal(model(INPUTS), expected)


def test_a_method_is_any_function_of_experts(tmp_path):
    def median(experts):
        return experts.merged(experts.map(lambda key, tau: tau.median(0).values))

    base, experts = tuned()
    merged = merge(median, base, experts)
    taus = torch.stack([expert["0.weight"] - base["0.weight"] for expert in experts])
    assert torch.equal(merged.weight("0.weight"), base["0.weight"] + taus.median(0).values)
    assert merged.provenance["method"] == {"name": "median"}
    assert load(merged.save(tmp_path / "median.safetensors"), network())(INPUTS).isfinite().all()


def test_the_header_says_where_a_merge_came_from(tmp_path, stored):
    base, experts = tuned(2)
    paths = [stored(state) for state in (base, *experts)]
    merged = merge(Dare(0.9, seed=3, then=Ties(0.1)), paths[0], paths[1:], ["cars", "signs"])
    with safe_open(merged.save(tmp_path / "merged.safetensors", note="a test"), "pt") as file:
        provenance = json.loads(file.metadata()["provenance"])
    assert provenance["method"]["drop"] == 0.9 and provenance["method"]["seed"] == 3
    assert provenance["method"]["then"] == describe(Ties(0.1)) and provenance["method"]["then"]["density"] == 0.1
    assert provenance["tasks"] == ["cars", "signs"] and provenance["note"] == "a test" and provenance["scale"] == 0.3
    assert [provenance["base"], *provenance["experts"]] == [sha256(path.read_bytes()).hexdigest() for path in paths]


@pytest.mark.parametrize("method", [pytest.param(method(), id=name) for name, method in discovered().items()])
def test_every_method_is_described_as_json(method):
    """As the header of a saved merge has it; objectives of a descent and whatever lies inside, too."""
    told = json.loads(json.dumps(describe(method)))
    assert told["name"] == type(method).__name__
    if "train" in told:
        names = [type(objective).__name__ for objective in method.train.objectives]
        assert [objective["name"] for objective in told["train"]["objectives"]] == names


def test_saving_twice_gives_the_same_bytes(tmp_path):
    first, second = (merge(Ties(), *tuned()).save(tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_a_file_that_names_its_backbone_needs_no_module(tmp_path):
    torch.manual_seed(0)
    base, *experts = (BACKBONE.build().state_dict() for _ in range(3))
    merged = merge(TaskArithmetic(0.5), base, experts)
    model = load(merged.save(tmp_path / "tower.safetensors", backbone=BACKBONE.facts()))
    assert equal(model.state_dict(), models(merged)[0]) and not model.training
    reference, images = BACKBONE.build(), BACKBONE.prepare(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8))
    reference.load_state_dict(models(merged)[0])
    assert torch.equal(model(images), reference(images)) and model(images).shape == (2, 8)


@pytest.mark.parametrize("wrong", [nn.Linear(6, 12), network()[:1], nn.Sequential(nn.Linear(6, 11), *network()[1:])])
def test_the_wrong_backbone(wrong, tmp_path):
    path = merge(Average(), *tuned()).save(tmp_path / "merged.safetensors")
    with pytest.raises(UserError, match=r"does not fit (Linear|Sequential): .* Pass the backbone it was") as error:
        load(path, wrong)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_loaded(tmp_path, stored):
    with pytest.raises(UserError, match="was not written by this library"):
        load(stored(tuned()[0]), network())
    with pytest.raises(UserError, match="There is no checkpoint"):
        load(tmp_path / "none.safetensors", network())
    path = merge(Average(), *tuned()).save(tmp_path / "merged.safetensors")
    with pytest.raises(UserError, match="does not say which architecture"):
        load(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated or damaged"):
        load(path, network())


def test_no_input_is_overwritten(stored, tmp_path, monkeypatch):
    """By its path, a relative one, a link of either kind; a merge that was opened is an input of its own."""
    base, experts = tuned()
    paths = [stored(state) for state in (base, *experts)]
    before = [path.read_bytes() for path in paths]
    merged = merge(Average(), paths[0], paths[1:])
    (tmp_path / "soft").symlink_to(paths[1])
    (tmp_path / "hard").hardlink_to(paths[2])
    monkeypatch.chdir(tmp_path)
    for target in (*paths, paths[3].name, "soft", "hard", tmp_path / "." / paths[0].name):
        with pytest.raises(UserError, match=r"is one of the inputs .*Choose another name"):
            merged.save(target)
    assert [path.read_bytes() for path in paths] == before
    again = open_merged(merged.save("merged.safetensors"))
    with pytest.raises(UserError, match="is one of the inputs"):
        again.save("merged.safetensors", dtype="fp16")
    assert merged.save("merged.safetensors").exists()  # an earlier result is no input
    with pytest.raises(UserError, match="is one of the inputs"):
        merged.save(tmp_path)  # the folder that they lie in
    with pytest.raises(UserError, match=r"new may be meant as a file or as a folder\. Write new/ for a folder"):
        merged.save("new")


def test_ids_are_computed_once_each_beside_the_merge(stored, tmp_path, monkeypatch):
    """By a thread that runs ahead and by the one that saves, neither of which repeats what the other does."""
    base, experts = tuned(6)
    paths = [stored(state) for state in (base, *experts)]
    honest, hashed, ahead = files.sha256, [], Event()

    def digest(path):
        hashed.append((path, current_thread() is main_thread()))
        ahead.set()
        return honest(path)

    def method(experts):
        assert ahead.wait(60)  # before the merge is done
        return Average()(experts)

    monkeypatch.setattr(files, "sha256", digest)
    path = merge(method, paths[0], paths[1:]).save(tmp_path / "merged.safetensors")
    assert sorted(name for name, _ in hashed) == sorted(paths) and (paths[0], False) in hashed
    with safe_open(path, "pt") as file:
        provenance = json.loads(file.metadata()["provenance"])
    assert [provenance["base"], *provenance["experts"]] == [sha256(each.read_bytes()).hexdigest() for each in paths]


def test_an_input_that_changed_before_the_merge_was_saved(stored, tmp_path, monkeypatch):
    """What was merged and the id in the header would be of two contents."""
    base, experts = tuned()
    paths = [stored(state) for state in (base, *experts)]
    monkeypatch.setattr(api, "identify_ahead", lambda checkpoints: None)
    merged = merge(Average(), paths[0], paths[1:])
    paths[2].unlink()
    stored(experts[0]).rename(paths[2])
    with pytest.raises(UserError, match=rf"{paths[2].name} was changed since it was opened"):
        merged.save(tmp_path / "merged.safetensors")
    assert not [each for each in tmp_path.iterdir() if "merged" in each.name]


def test_a_merge_at_another_scale_knows_what_it_was_made_from(stored):
    """Twin makes its parts anew for a scale, and they must neither overwrite an expert nor lose their provenance."""
    base, experts = tuned()
    paths = [stored(state) for state in (base, *experts)]
    for dtype in (None, "bf16"):
        merged = merge(Twin(start=None), paths[0], paths[1:])
        scaled = (merged if dtype is None else merged.cast(dtype)).scaled(0.7).scaled(0.5)
        assert scaled.provenance == merged.provenance and [each.id for each in scaled.inputs] == [
            sha256(path.read_bytes()).hexdigest() for path in paths[1:]
        ]
        with pytest.raises(UserError, match="is one of the inputs"):
            scaled.save(paths[1])


@pytest.mark.parametrize("in_memory", [True, False])
def test_only_a_thread_that_reads_files_is_left_behind_at_exit(stored, in_memory):
    """Python stops a daemon by unwinding its stack, which inside of torch aborts the process."""
    base, _ = tuned()
    entered, go_on = Event(), Event()

    class Slow:
        files = () if in_memory else (stored(base),)

        @property
        def id(self):
            entered.set()
            go_on.wait(60)
            return "id"

    before = set(threads())
    identify_ahead([Slow()])
    assert entered.wait(60)
    (started,) = set(threads()) - before
    go_on.set()
    assert started.daemon is not in_memory
    started.join()
