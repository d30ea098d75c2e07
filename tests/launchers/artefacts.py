"""Makers of every artefact in a cache, and what their keys are made of."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from launchers.cell_cache import content, expert_scores
from merging import Cache, Experts, neurons
from merging.backbones.open_clip import OpenClip
from merging.checkpoints import SafetensorsFile, StateDict
from merging.checkpoints.safetensors_file import write_safetensors
from merging.context import Context
from merging.fit import coefficients as coefficients_of
from merging.fit.gates import Learned
from merging.methods import AdaMerging, TaskArithmetic
from merging.neurons import Neurons
from merging.similarity import cosines
from tasks import evaluate, finetune, journal, suite
from tasks.engine import Engine
from tasks.heads import text as heads
from tasks.heads import text_towers
from tasks.heads.head import Given, ZeroShot
from tasks.heads.probe import Probe
from tasks.mini import experts as mini
from tasks.recipes import Recipe
from tasks.score import accuracy
from tasks.split import Split
from tasks.task import LabelledTask
from tasks.vision import data as vision
from tasks.vision import images
from tasks.vision.parts import Rule
from tasks.vision.rows import RowSource

ROOT = Path(__file__).parents[2]
CONFIG = {"width": 16, "head_width": 8, "layers": 1, "image_size": 16, "patch_size": 8}
BACKBONE = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "quick_gelu": False, "head_width": 8}
OTHER = {"mean": (0.4, 0.5, 0.5), "std": (0.5, 0.5, 0.4), "quick_gelu": True, "head_width": 16}
RECIPE, RULE = Recipe(), Rule()
KEYS = ("visual.transformer.resblocks.0.mlp.c_fc.weight", "visual.transformer.resblocks.0.mlp.c_proj.weight")


class Asked(Cache):
    """A cache that has nothing, keeps nothing and remembers what it was asked for."""

    def __init__(self, *_):
        super().__init__("nowhere")
        self.keys = []

    def get(self, key):
        self.keys.append(key)

    def put(self, key, payload):
        """Nothing is kept."""


@dataclass(frozen=True)
class Shaded:
    """Four images."""

    first: int = 0
    classes: tuple[str, ...] = ("dark", "light")

    def split(self, name):
        pixels = torch.arange(4 * 3 * 16 * 16).view(4, 3, 16, 16) % 251 + self.first
        return Split(name, pixels.to(torch.uint8), torch.tensor([0, 1, 0, 1]))


def Shades(name="shades", first=0, scale=1.0):
    return LabelledTask(name, Shaded(first), Given(ZeroShot(scale * torch.eye(2, 8))))


def backbone(mean, std, quick_gelu, head_width):
    return OpenClip("tiny", 8, {**CONFIG, "head_width": head_width}, quick_gelu, mean, std)


def state(seed):
    return {key: torch.full((4, 4), 1.0 + seed) + torch.eye(4) * seed for key in KEYS}


def opened(cache, base=0, expert=1, sparsifier=()):
    return replace(Experts.open(state(base), [state(expert), state(7)], cache=cache), sparsifiers=sparsifier)


def svd(cache, patch, matrix=1.0):
    opened(cache).svd(torch.eye(3)[None] * matrix)


def tucker(cache, patch, stack=1.0, ranks=(1, 2, 2), engine="hooi"):
    opened(cache).tucker(torch.eye(3).expand(2, 3, 3) * stack, ranks, engine)


def activations(cache, patch, base=0, expert=1, images=0, device="cpu", source="expert", **how):
    knobs = {name: how.pop(name) for name in ("statistic", "tokens", "at", "count") if name in how}
    knobs |= {"images": knobs.pop("count")} if "count" in knobs else {}
    tasks = suite.Suite("two", (Shades("a", images), Shades("b")))
    seen = suite.calibration(tasks, backbone(**{**BACKBONE, **how}), "calibration")
    patch.setattr(neurons, "activations", lambda *given: {name: torch.zeros(2, 4) for name in given[2]})
    data = SimpleNamespace(unlabelled=lambda _: replace(seen, device=torch.device(device)))
    Neurons(source=source, **knobs).measured(opened(cache, base, expert), Context(data))


def coefficients(
    cache, patch, base=0, expert=1, images=0, head=1.0, device="cpu", seed=0, level="task", names=("a", "b"), **how
):
    patch.setattr(coefficients_of.Coefficients, "__init__", lambda *_: None)
    patch.setattr(coefficients_of.Coefficients, "learned", torch.zeros(2, 2))
    patch.setattr(coefficients_of, "descend", lambda *_: [])
    tasks = suite.Suite("two", (Shades("a", images, head), Shades("b")))
    seen = suite.calibration(tasks, backbone(**{**BACKBONE, **how}), "calibration")
    data = SimpleNamespace(unlabelled=lambda _: replace(seen, device=torch.device(device)))
    experts = replace(opened(cache, base, expert), tasks=names)
    AdaMerging(level)(experts, Context(data, seed=seed))


def probe(cache, patch, expert=1, images=0, classes=("a", "b"), **how):
    patch.setattr(Probe, "_fit", lambda self, task, classes: {"weight": torch.zeros(2, 8), "bias": torch.zeros(2)})
    Probe(StateDict(state(expert)), backbone(**{**BACKBONE, **how}), Shaded(images), cache).open("a", classes)


def similarity(cache, patch, base=0, expert=1, only=None):
    cosines(replace(opened(cache, base, expert), only=only))


def expert(cache, patch, base=0, task="shades", images=0, head=1.0, recipe=RECIPE, seed=0, **facts):
    patch.setattr(finetune, "train_expert", lambda job, on_step=None: {"w": torch.zeros(1)})
    tasks = suite.Suite("one", (Shades(task, images, head),))
    tower = backbone(**{**BACKBONE, **facts})
    finetune.make_experts(StateDict(state(base)), tower, tasks, recipe, seed, cache, workers=1)


def head(cache, patch, text=0.0, classes=("a", "b"), templates=("{}",), quick_gelu=True):
    patch.setattr(heads, "build_tower", lambda *_: None)
    patch.setattr(heads, "read_prompts", lambda tower, prompts: torch.ones(len(prompts), 2))
    heads.zero_shot_head(StateDict({"logit_scale": torch.tensor(text)}), classes, templates, quick_gelu, cache)


def tuned_text(cache, patch, base=0.0, expert=1.0):
    text = {"transformer.w": torch.zeros(2)}
    files = [StateDict({**text, "logit_scale": torch.tensor(scale)}) for scale in (expert, base)]
    text_towers.left_out(*files, cache)


def trained_gates(
    cache, patch, images=0, head=1.0, scale=0.3, base="x", device="cpu", made_by="code", dtype="fp32", masks=0, **how
):
    names = ("router", "suite", "seed", "engine", "method", "experts", "backbone")
    cell = {name: how.pop(name, name) for name in names} | {"checkpoints": {"base": base}}

    def seen(split):
        first = Shades("a", images, head) if split == "test" else Shades("a", masks)
        tasks = suite.Suite("two", (first, Shades("b")))
        images_of = suite.calibration(tasks, backbone(**{**BACKBONE, **how}), "calibration")
        return replace(images_of, device=torch.device(device))

    merged, router = TaskArithmetic(scale=scale)(opened(cache)).cast(dtype), Learned(split="test")
    context = Context(SimpleNamespace(unlabelled=seen))
    cache.keys.append(content(router, merged, context, cell, made_by, ["calibration"]))


def scored(cache, patch, task="a", images=0, head=1.0, split="val", scale=0.3, batch=100, code="code", device="cpu"):
    patch.setattr(journal, "Cache", lambda folder: cache)
    patch.setattr(evaluate, "outcome", lambda *given: evaluate.Outcome(accuracy(0, 1), None))
    tower = SimpleNamespace(load_state_dict=lambda *given, **how: None)
    idle = {"ready": lambda self, tower, routed=False: tower, "torch_device": torch.device(device)}
    engine = type("Idle", (Engine,), idle)("cpu", batch=batch)
    tasks = suite.Suite("one", (Shades(task, images, head),))
    board = evaluate.Grid(tasks, SimpleNamespace(build=lambda: tower), engine)
    board.score(TaskArithmetic(scale=scale)(opened(None)), split, journal=journal.Journal("folder", code))


def expert_accuracy(
    cache, patch, task="a", images=0, head=1.0, split="val", base="x", batch=100, device="cpu", precision="fp32", **how
):  # fmt: skip
    tower, tasks = backbone(**{**BACKBONE, **how}), suite.Suite("one", (Shades(task, images, head),))
    engine = type("Placed", (Engine,), {"torch_device": torch.device(device)})("cpu", precision, batch=batch)
    board = evaluate.Grid(tasks, tower, engine)
    patch.setattr(evaluate.Grid, "score", lambda *given, **how: evaluate.Scored({task: accuracy(1, 2)}, None))
    setup = SimpleNamespace(experts=opened(None), grid=board, checkpoints={"base": base}, gates=cache)
    expert_scores("val", setup, journal.NOWHERE)


def vision_task(source="1" * 40, rule=RULE, size=16, task="birds", cache=None):
    found = RowSource(hub="a/b", revision=source, cache=cache)
    store = vision.Store("images", "cache")
    return vision.VisionData(task, found, None, None, rule, size, store)


def class_names(cache, patch, source="1" * 40):
    patch.setattr(RowSource, "_classes", lambda self: ("a",))
    assert vision_task(source, cache=cache).classes == ("a",)


def decoded(cache, patch, split="val", version=1, **how):
    patch.setattr(images, "FORMAT", version)
    task = vision_task(**how)
    cache.keys.append(str(task._images.path(task.name, split, task._key(split))))


def file_id(cache, patch, content=1.0, folder="one"):
    path = patch.folder / folder / "x.safetensors"
    path.parent.mkdir(exist_ok=True)
    write_safetensors(path, StateDict({"w": torch.tensor(content)}).specs(), [("w", torch.tensor(content))], {})
    _ = SafetensorsFile(path, cache).id


DECOMPOSITION = ("merging.decompose.svd",)


def second_base(cache, monkeypatch, **recipe):
    """The base that a run pretrains beside the shipped one."""
    model = SimpleNamespace(state_dict=lambda: {"visual.proj": torch.ones(2)})
    monkeypatch.setattr(mini.pretrain, "train", lambda _: (model, []))
    mini.FromTwo(other=replace(mini.OTHER, **recipe)).other_base(cache)


ARTEFACTS = {  # what makes the key, by the name in the key; its ingredients with other values; the code behind it
    "svd": (svd, {"matrix": 2.0}, DECOMPOSITION),
    "tucker": (tucker, {"stack": 2.0, "ranks": (1, 2, 3), "engine": "hosvd"},
               (*DECOMPOSITION, "merging.decompose.tucker")),
    "activations": (activations, {"expert": 2, "images": 1, "device": "meta", "source": "base", "statistic": "rms",
                                  "tokens": "class", "at": "input", "count": 3, **OTHER}, ("merging.statistics",)),
    "coefficients": (coefficients, {"base": 2, "expert": 2, "images": 1, "head": 2.0, "device": "meta", "seed": 1,
                                   "level": "layer", "names": ("c", "b"), **OTHER}, ("merging.methods.ada_merging",)),
    "linear probe": (probe, {"expert": 2, "images": 1, "classes": ("a", "b", "c"), **OTHER}, ("tasks.heads.probe",)),
    "similarity": (similarity, {"base": 3, "expert": 2, "only": frozenset(KEYS[:1])}, ("merging.similarity",)),
    "expert": (expert, {"base": 1, "task": "tints", "images": 1, "head": 2.0, "recipe": Recipe(steps=3), "seed": 1,
                        **OTHER}, ("tasks.training", "tasks.recipes")),
    "pretrained base": (second_base, {"seed": 2, "steps": 3, "lr": 1.0, "text": "trained"},
                        ("tasks.mini.pretrain", "tasks.mini.generate")),
    "zero-shot head": (head, {"text": 1.0, "classes": ("a", "c"), "templates": ("a {}",), "quick_gelu": False},
                       ("tasks.heads.text",)),
    "tuned text": (tuned_text, {"base": 2.0, "expert": 2.0}, ("tasks.heads.text_towers",)),
    "trained gates": (trained_gates, {"images": 1, "head": 2.0, "scale": 0.4, "base": "y", "device": "meta",
                                     "made_by": "new", "router": 1, "suite": 1, "seed": 1, "engine": 1, "method": 1,
                                     "experts": 1, "backbone": 1, "dtype": "bf16", "masks": 1, **OTHER}, ()),
    "scored": (scored, {"task": "c", "images": 1, "head": 2.0, "split": "test", "scale": 0.4, "batch": 10,
                        "code": "new", "device": "meta"}, ()),
    "expert scores": (expert_accuracy, {"task": "c", "images": 1, "head": 2.0, "base": "y", "batch": 3,
                                        "device": "meta", "precision": "bf16", **OTHER}, ()),
    "class names": (class_names, {"source": "2" * 40}, ()),
    "decoded images": (decoded, {"split": "test", "version": 2, "source": "2" * 40, "rule": Rule(seed=1), "size": 32,
                                 "task": "cars"}, ()),
    "sha256": (file_id, {"content": 2.0, "folder": "two"}, ()),
}  # fmt: skip
