"""Hugging Face image classifiers, one head per expert, merged and scored through a suite of folders."""

import pytest
import torch
from PIL import Image

from merging import Cache, load, open_merged
from merging.backbones.hugging_face import HuggingFace
from merging.context import Context
from merging.errors import UserError
from merging.fit.gates import Learned, TaskId
from merging.methods import Average, Base, Expert, Ties, Twin
from merging.routing.gates import GateShape, listening
from merging.routing.install import install
from tasks.data import SuiteData
from tasks.engine import Engine
from tasks.evaluate import Grid
from tasks.vision.data import Store
from tasks.vision.folder import Folder
from tasks.vision.suite import build

transformers = pytest.importorskip("transformers")
TASKS = {"pets": ("cat", "dog"), "fruit": ("apple", "kiwi", "pear")}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16,
         "patch_size": 8}  # fmt: skip
BACKBONE = HuggingFace("tiny_vit", "ViTForImageClassification", {"model_type": "vit", **SIZES}, "first")


def model(seed, classes, base=None):
    """A classifier a little off the base, and its own head."""
    torch.manual_seed(seed)
    config = transformers.ViTConfig(**SIZES, id2label=dict(enumerate(classes)))
    made = transformers.ViTForImageClassification(config).eval()
    if base is not None:
        state = {key: value + 0.05 * torch.randn(value.shape) for key, value in base.state_dict().items()}
        made.load_state_dict({key: value for key, value in state.items() if key.startswith("vit.")}, strict=False)
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of experts and images, and the experts as transformers has them."""
    root = tmp_path_factory.mktemp("classifiers")
    base = model(0, ("any",))
    base.vit.save_pretrained(root / "base")  # without the head, and so without the prefix of the encoder
    experts = {task: model(seed, classes, base) for seed, (task, classes) in enumerate(TASKS.items(), 1)}
    for task, expert in experts.items():
        expert.save_pretrained(root / task)
        for index, name in enumerate(TASKS[task]):
            for part, count in (("train", 6), ("test", 5)):
                (root / "images" / task / part / name).mkdir(parents=True)
                for number in range(count):
                    colour = (40 * number, 80 * index, 255 - 50 * number)
                    Image.new("RGB", (16, 16), colour).save(root / "images" / task / part / name / f"{number}.png")
    return root, experts


def suite(root, **classes):
    sources = {task: {"folder": f"{root}/images/{task}", **({"classes": classes[task]} if task in classes else {})}
               for task in TASKS}  # fmt: skip
    return build("mine", None, Store(f"{root}/decoded", f"{root}/cache", 1), None, size=16, sources=sources)


def source(root, heads="expert"):
    return Folder(f"{root}/base", f"{root}/{{task}}", heads=heads)


def test_experts_score_as_transformers_says(made):
    root, experts = made
    headed = source(root).headed(suite(root), BACKBONE, Cache(root / "cache"))
    opened = source(root).open(headed, BACKBONE, Cache(root / "cache"))
    scored = Grid(headed, BACKBONE, Engine("cpu", batch=4)).score(Expert()(opened), "test")
    for task in headed.tasks:
        split = task.split("test")
        with torch.no_grad():
            predicted = experts[task.name](pixel_values=split.inputs.float() / 127.5 - 1).logits.argmax(1)
        assert scored.scores[task.name].value == float((predicted == split.labels).double().mean())
        assert task.head().out_features == len(TASKS[task.name])
    assert opened.heads.keys() == TASKS.keys()
    assert all(set(head) == {"classifier.weight", "classifier.bias"} for head in opened.heads.values())
    for method in (Base(), Average(), Ties()):
        assert set(Grid(headed, BACKBONE).score(method(opened), "test").scores) == set(TASKS)


def test_a_gate_routes_every_image(made):
    """Image by image: ask the gate, mix the weights it gives into a dense model, and read its own task's head."""
    root, _ = made
    headed = source(root).headed(suite(root), BACKBONE, Cache(root / "cache"))
    opened = source(root).open(headed, BACKBONE, Cache(root / "cache"))
    router = Learned(gate=GateShape(sees="early"), train=TaskId(steps=5))
    merged, _ = router.fit(Twin(keep=1.0)(opened), opened, Context(SuiteData(headed, BACKBONE)))
    model, dense, right = install(BACKBONE.build(), merged), BACKBONE.build(), {}
    for task in headed.tasks:
        hits, split = 0, task.split("test")
        for image, label in zip(split.inputs, split.labels, strict=True):
            inputs = BACKBONE.prepare(image[None])
            with torch.no_grad(), listening() as recorded:
                BACKBONE.features(model, inputs)
            dense.load_state_dict(dict(merged.state(recorded[0][0])))
            with torch.no_grad():
                hits += int(task.head()(BACKBONE.features(dense, inputs)).argmax() == label)
        right[task.name] = hits / len(split)
    scored = Grid(headed, BACKBONE, Engine("cpu", batch=4)).score(merged, "test")
    assert scored.values == right
    assert [sum(row) for row in scored.routing.matrix] == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("method", [Ties(), Twin(keep=0.5)], ids=["static", "routed"])
def test_a_saved_model_scores_the_same(made, method, tmp_path):
    root, _ = made
    headed = source(root).headed(suite(root), BACKBONE, Cache(root / "cache"))
    opened = source(root).open(headed, BACKBONE, Cache(root / "cache"))
    merged = method(opened)
    if merged.deltas:
        router = Learned(gate=GateShape(sees="early"), train=TaskId(steps=2))
        merged, _ = router.fit(merged, opened, Context(SuiteData(headed, BACKBONE)))
    path, grid = merged.save(tmp_path / "merged.safetensors", backbone=BACKBONE.facts()), Grid(headed, BACKBONE)
    assert grid.score(open_merged(path), "test").scores == grid.score(merged, "test").scores
    inputs = BACKBONE.prepare(headed.tasks[0].split("test").inputs)
    with torch.no_grad():
        features = [BACKBONE.features(model, inputs) for model in (load(path), install(BACKBONE.build(), merged))]
    assert torch.equal(*features)


def test_heads_by_a_probe_and_from_files(made):
    root, experts = made
    cache = Cache(root / "cache")
    probed = source(root, "probe").headed(suite(root), BACKBONE, cache)
    opened = source(root).open(probed, BACKBONE, cache)
    train = Grid(probed, BACKBONE).score(Expert()(opened), "train")
    assert all(score.value > 0.5 for score in train.scores.values())
    from safetensors.torch import save_file

    for task, expert in experts.items():
        save_file(expert.classifier.state_dict(), root / f"{task}.head")
    filed = source(root, f"{root}/{{task}}.head").headed(suite(root), BACKBONE, cache)
    for task in filed.tasks:
        assert torch.equal(task.head().weight, experts[task.name].classifier.weight)
    with pytest.raises(UserError, match=r"experts.heads=mine is unknown. Choose one of suite, expert, probe"):
        source(root, "mine").headed(suite(root), BACKBONE, cache)


def test_classes_in_another_order_and_of_another_number_are_refused(made):
    root, _ = made
    with pytest.raises(UserError, match=r"pets: output 0 is dog, and in the head of its expert, .* it is cat"):
        source(root).headed(suite(root, pets=["dog", "cat"]), BACKBONE, Cache(root / "cache"))
    headed = source(root).headed(suite(root, fruit=["apple", "kiwi"]), BACKBONE, Cache(root / "cache"))
    with pytest.raises(UserError, match="head of fruit has 3 outputs, and the task has 2 classes"):
        headed.tasks[1].head()
