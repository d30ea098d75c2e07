"""Fabricated CLIPs of a small width under exactly the published names, in the layouts of the hub and the drives.

`whole(seed)` is a CLIP in open_clip's names; everything else is made from it by an own transcription of the layouts, so
that the readers are tested against a second opinion. The classes of pickled modules exist only while they are written.
"""

import io
import json
import pickle
import re
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from merging.backbones.open_clip import OpenClip
from merging.checkpoints.pickles import PickleFile

State = dict[str, Tensor]
EMBED, WIDTH, TEXT_WIDTH, BLOCKS, WORDS, CONTEXT = 16, 64, 24, 2, 49408, 77
SUFFIXES = {  # of the experts of tanganke
    "SUN397": "sun397", "Cars": "stanford-cars", "RESISC45": "resisc45", "EuroSAT": "eurosat", "SVHN": "svhn",
    "GTSRB": "gtsrb", "MNIST": "mnist", "DTD": "dtd", "Flowers102": "oxford_flowers102", "PCAM": "pcam",
    "FER2013": "fer2013", "OxfordIIITPet": "oxford-iiit-pet", "STL10": "stl10", "CIFAR100": "cifar100",
    "CIFAR10": "cifar10", "Food101": "food101", "FashionMNIST": "fashion_mnist", "EMNIST": "emnist_letters",
    "KMNIST": "kmnist", "RenderedSST2": "rendered-sst2",
}  # fmt: skip
MIDDLES = {"clip_vit_b32": "base-patch32", "clip_vit_b16": "base-patch16", "clip_vit_l14": "large-patch14"}


def backbone(name: str = "clip_vit_b32", patch: int = 32, size: int = 224) -> OpenClip:
    """A small tower under a published name."""
    shape = {"layers": BLOCKS, "width": WIDTH, "head_width": 64, "patch_size": patch, "image_size": size}
    return OpenClip(name, EMBED, shape, quick_gelu=True)


def whole(seed: int = 0, patch: int = 32, size: int = 224, words: int = WORDS) -> State:
    """A CLIP in open_clip's names, random: image tower `visual.*`, text tower, logit scale."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: 0.1 * torch.randn(*shape, generator=random)  # noqa: E731
    state = {
        "positional_embedding": normal(CONTEXT, TEXT_WIDTH), "text_projection": normal(TEXT_WIDTH, EMBED),
        "logit_scale": torch.tensor(4.6052), "token_embedding.weight": normal(words, TEXT_WIDTH),
        "ln_final.weight": 1 + normal(TEXT_WIDTH), "ln_final.bias": normal(TEXT_WIDTH),
        "visual.class_embedding": normal(WIDTH), "visual.conv1.weight": normal(WIDTH, 3, patch, patch),
        "visual.positional_embedding": normal((size // patch) ** 2 + 1, WIDTH), "visual.proj": normal(WIDTH, EMBED),
    }  # fmt: skip
    for stack, width in (("visual.transformer", WIDTH), ("transformer", TEXT_WIDTH)):
        for block in range(BLOCKS):
            for name, shape in {
                "attn.in_proj": (3 * width, width), "attn.out_proj.": (width, width),
                "mlp.c_fc.": (4 * width, width), "mlp.c_proj.": (width, 4 * width),
            }.items():  # fmt: skip
                joint = "_" if name.endswith("proj") else ""
                state[f"{stack}.resblocks.{block}.{name}{joint}weight"] = normal(*shape)
                state[f"{stack}.resblocks.{block}.{name}{joint}bias"] = normal(shape[0])
            norms = (f"{stack}.resblocks.{block}.ln_1", f"{stack}.resblocks.{block}.ln_2")
            state |= {f"{norm}.{kind}": 1 + normal(width) for norm in norms for kind in ("weight", "bias")}
    return state | {f"visual.{norm}.{kind}": 1 + normal(WIDTH) for norm in ("ln_pre", "ln_post")
                    for kind in ("weight", "bias")}  # fmt: skip


def tuned(state: Mapping[str, Tensor], seed: int, proj: bool = True) -> State:
    """An expert: the image tower moved a little, `visual.proj` only where families train it."""
    random = torch.Generator().manual_seed(1000 + seed)
    moved = lambda key: key.startswith("visual.") and (proj or key != "visual.proj")  # noqa: E731
    return {
        key: value + 0.01 * torch.randn(value.shape, generator=random) if moved(key) else value.clone()
        for key, value in state.items()
    }


def hugging_face(state: Mapping[str, Tensor], text: bool = True) -> State:
    """A CLIPModel's tensors as its files name them; with `text` False a CLIPVisionModel's, without projection."""
    towers = {"visual.": "vision_model."} | ({"": "text_model."} if text else {})
    found: State = {}
    for ours, theirs in towers.items():
        for key, value in state.items():
            block = re.fullmatch(re.escape(ours) + r"transformer\.resblocks\.(\d+)\.(.+)", key)
            if block is not None:
                found |= {f"{theirs}encoder.layers.{block[1]}.{name}": part for name, part in _block(block[2], value)}
    for suffix in ("weight", "bias"):
        found[f"vision_model.pre_layrnorm.{suffix}"] = state[f"visual.ln_pre.{suffix}"]
        found[f"vision_model.post_layernorm.{suffix}"] = state[f"visual.ln_post.{suffix}"]
    start = "vision_model.embeddings."
    found[start + "class_embedding"] = state["visual.class_embedding"]
    found[start + "patch_embedding.weight"] = state["visual.conv1.weight"]
    found[start + "position_embedding.weight"] = state["visual.positional_embedding"]
    if text:
        start = "text_model.embeddings."
        found[start + "token_embedding.weight"] = state["token_embedding.weight"]
        found[start + "position_embedding.weight"] = state["positional_embedding"]
        found |= {f"text_model.final_layer_norm.{kind}": state[f"ln_final.{kind}"] for kind in ("weight", "bias")}
        found["visual_projection.weight"] = state["visual.proj"].T.contiguous()
        found["text_projection.weight"] = state["text_projection"].T.contiguous()
        found["logit_scale"] = state["logit_scale"]
    return found


def _block(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One parameter of a block; the keys of k, v and q come in Hugging Face's own order."""
    if name.startswith("attn.in_proj_"):
        third = len(value) // 3
        for letter, start in (("k", third), ("v", 2 * third), ("q", 0)):
            yield f"self_attn.{letter}_proj.{name[13:]}", value[start : start + third].clone()
        return
    for ours, theirs in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                         ("mlp.c_proj", "mlp.fc2"), ("attn.out_proj", "self_attn.out_proj")):  # fmt: skip
        if name.startswith(ours):
            yield theirs + name[len(ours) :], value


def base_repository(state: Mapping[str, Tensor], safetensors: bool = True) -> dict[str, bytes]:
    """The files of openai/clip-vit-*; those of base-patch32 have pytorch_model.bin only, with integer position ids."""
    config = json.dumps({"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": EMBED}).encode()
    tensors = hugging_face(state)
    if safetensors:
        return {"config.json": config, "model.safetensors": save(tensors)}
    for tower, length in (("vision", len(state["visual.positional_embedding"])), ("text", CONTEXT)):
        tensors[f"{tower}_model.embeddings.position_ids"] = torch.arange(length)[None]
    file = io.BytesIO()
    torch.save(tensors, file)
    return {"config.json": config, "pytorch_model.bin": file.getvalue()}


def vision_repository(state: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The files of an expert of tanganke."""
    config = {"architectures": ["CLIPVisionModel"], "hidden_act": "quick_gelu", "model_type": "clip_vision_model"}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save(hugging_face(state, text=False)),
            "README.md": b"# expert\n"}  # fmt: skip


def lora_repository(seed: int, rank: int = 4, alpha: int = 8, text: bool = False) -> dict[str, bytes]:
    """The files of a LoRA adapter on q and v of the image tower, and with `text` of both, as peft writes them."""
    random, tensors = torch.Generator().manual_seed(seed), {}
    for tower, width in {"vision": WIDTH, **({"text": TEXT_WIDTH} if text else {})}.items():
        for block in range(BLOCKS):
            for letter in "qv":
                name = f"base_model.model.{tower}_model.encoder.layers.{block}.self_attn.{letter}_proj."
                tensors[f"{name}lora_A.weight"] = torch.randn(rank, width, generator=random)
                tensors[f"{name}lora_B.weight"] = torch.randn(width, rank, generator=random)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj", "v_proj"],
              "fan_in_fan_out": False, "bias": "none", "use_rslora": False, "task_type": None,
              "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}  # fmt: skip
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


def encoder_state(state: Mapping[str, Tensor]) -> State:
    """What `ImageEncoder.state_dict()` gives: all of the CLIP behind `model.`, without the text transformer."""
    return {f"model.{key}": value for key, value in state.items() if not key.startswith("transformer.")}


CLASSES = {
    "src.modeling": ("ImageEncoder",),
    "open_clip.model": ("CLIP", "VisualTransformer", "Transformer", "ResidualAttentionBlock", "LayerNorm", "QuickGELU"),
    "torchvision.transforms.transforms": ("Compose", "Resize", "CenterCrop", "Normalize", "ToTensor"),
}


@contextmanager
def foreign_code() -> Iterator[dict[str, type]]:
    """The modules that the published pickles were written with, for as long as it takes to write one."""
    names = {"src", "open_clip", "open_clip.transform", "torchvision", "torchvision.transforms",
             "torchvision.transforms.functional", *CLASSES}  # fmt: skip
    before = {name: sys.modules.get(name) for name in names}
    made = {name: types.ModuleType(name) for name in names}
    classes: dict[str, type] = {}
    for module, members in CLASSES.items():
        base = object if "transforms" in module else nn.Module
        for name in members:
            classes[name] = type(name, (base,), {"__module__": module})
            setattr(made[module], name, classes[name])
    mode = Enum("InterpolationMode", {"BICUBIC": "bicubic"}, module="torchvision.transforms.functional")
    made["torchvision.transforms.functional"].InterpolationMode = classes["InterpolationMode"] = mode  # type: ignore[attr-defined]
    convert = types.FunctionType((lambda image: image).__code__, {}, "_convert_to_rgb")
    convert.__module__, convert.__qualname__ = "open_clip.transform", "_convert_to_rgb"
    made["open_clip.transform"]._convert_to_rgb = classes["_convert_to_rgb"] = convert  # type: ignore[attr-defined, assignment]
    sys.modules.update(made)
    try:
        yield classes
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def image_encoder(state: Mapping[str, Tensor], classes: Mapping[str, type]) -> nn.Module:
    """A module with the parameters of `state`, of the classes that task_vectors pickled."""
    kinds = {"model": "CLIP", "visual": "VisualTransformer", "transformer": "Transformer", "ln_1": "LayerNorm",
             "ln_2": "LayerNorm", "ln_pre": "LayerNorm", "ln_post": "LayerNorm", "ln_final": "LayerNorm"}  # fmt: skip
    encoder = classes["ImageEncoder"]()
    for key, value in encoder_state(state).items():
        *path, last = key.split(".")
        module = encoder
        for name in path:
            if name not in module._modules:
                kind = "ResidualAttentionBlock" if name.isdigit() else kinds.get(name)
                module.add_module(name, classes[kind]() if kind else nn.Module())
            module = module._modules[name]
        module.register_parameter(last, nn.Parameter(value.clone()))
    encoder.model.register_buffer("attn_mask", torch.full((CONTEXT, CONTEXT), float("-inf")), persistent=False)
    steps = [classes[name]() for name in ("Resize", "CenterCrop", "ToTensor", "Normalize")]
    steps[0].interpolation = classes["InterpolationMode"]("bicubic")
    encoder.train_preprocess = encoder.val_preprocess = classes["Compose"]()
    encoder.val_preprocess.transforms = [*steps, classes["_convert_to_rgb"]]
    encoder.cache_dir = None
    return encoder


def write_encoder(path: Path, state: Mapping[str, Tensor], form: str = "zip", module: bool = True) -> Path:
    """An expert as families B to E store it. form: zip, legacy or plain; a whole module or its state dict."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with foreign_code() as classes:
        stored = image_encoder(state, classes) if module else encoder_state(state)
        if form == "plain":
            path.write_bytes(pickle.dumps(stored))
        else:
            torch.save(stored, path, _use_new_zipfile_serialization=form == "zip")
    return path


def inert_state(path: str | Path) -> State:
    """The state dict in a pickle, without running anything in it."""
    file = PickleFile(path)
    return {key: file.tensor(key) for key in file.specs()}
