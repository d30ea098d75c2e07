"""CLIPs in the files of others, under open_clip's names: what layout a file has, and what was stripped to see it."""

import re
from collections.abc import Callable, Collection

from merging.backbones.base import table
from merging.backbones.open_clip import PREFIX
from merging.checkpoints import Checkpoint
from merging.checkpoints.key_maps import from_hugging_face, from_image_encoder
from merging.checkpoints.opening import unwrapped
from merging.checkpoints.views import renamed, selected
from merging.errors import UserError
from merging.preflight import some

HUGGING_FACE = ("vision_model.", "text_model.", "embeddings.", "encoder.layers.", "pre_layrnorm.")
ENCODER = "model."  # what an ImageEncoder has before open_clip's names
FIRST = (  # a parameter that every image tower has, in each layout; what is before it wraps the whole CLIP
    re.compile(r"((?:.+\.)?)visual\.conv1\.weight"),
    re.compile(r"((?:.+\.)?)vision_model\.embeddings\.patch_embedding\.weight"),
    re.compile(r"((?:.+\.)?)embeddings\.patch_embedding\.weight"),
)
NUMBERS = ("input_resolution", "context_length", "vocab_size")  # beside the weights in OpenAI's own state dicts


def in_open_clip(checkpoint: Checkpoint) -> tuple[Checkpoint, str]:
    """A CLIP, or one of its towers, in open_clip's names; and its layout: open_clip, hugging_face or image_encoder.

    What wraps the names is stripped and told in the view's `remarks`. Raises UserError for two CLIPs in a file, for
    parameters beside the CLIP, and for names of none of these layouts.
    """
    if adapters := [key for key in checkpoint.specs() if ".lora_" in key]:
        raise UserError(
            f"{checkpoint.name} holds an adapter that is not merged into its weights: {some(adapters)}. Name the "
            f"folder that peft's save_pretrained wrote, or save the result of merge_and_unload."
        )
    bare = _without_numbers(unwrapped(checkpoint))
    before = _before(bare)
    if before == ENCODER and not any(key.startswith(f"{ENCODER}transformer.") for key in bare.specs()):
        return from_image_encoder(bare, text=True), "image_encoder"
    bare = _below(bare, before)
    if any(key.startswith(HUGGING_FACE) for key in bare.specs()):
        return from_hugging_face(bare), "hugging_face"
    if any(key.startswith(PREFIX) or key == "token_embedding.weight" for key in bare.specs()):
        return from_image_encoder(bare, text=True), "open_clip"
    raise UserError(
        f"{checkpoint.name} is no CLIP image tower: it has {some(list(checkpoint.specs()))}. What works: the names of "
        f"open_clip and OpenAI (visual.*), of Hugging Face's CLIP (vision_model.*) and of an ImageEncoder "
        f"(model.visual.*), in safetensors or in what torch.save wrote."
    )


def in_module(
    checkpoint: Checkpoint, names: Collection[str], architecture: str, in_memory: Callable[[str], str]
) -> tuple[Checkpoint, Checkpoint]:
    """A model under the names of a module, whatever prefix the file has or lacks (`vit.`), and the head beside it.

    architecture: the table that knows heads. in_memory: the module's name of a name in a file. Raises UserError for a
    file that lacks a name of the module.
    """
    bare = unwrapped(checkpoint)
    if any(in_memory(key) != key for key in bare.specs()):
        bare = renamed(bare, {key: in_memory(key) for key in bare.specs()})
    keys, first = bare.specs().keys(), next(iter(names))
    least: list[str] | None = None
    in_file: dict[str, str] = {}  # name in the file -> name of the module
    for start in ("", f"{first.partition('.')[0]}."):  # a file may lack the name of the encoder
        short = first.removeprefix(start)
        for prefix in [key.removesuffix(short) for key in keys if key == short or key.endswith(f".{short}")]:
            stored = {name: prefix + name.removeprefix(start) for name in names}
            lacking = [key for key in stored.values() if key not in keys]
            if least is None or len(lacking) < len(least):
                least, in_file = lacking, {key: name for name, key in stored.items()}
    if least is None or least:
        raise UserError(
            f"{checkpoint.name} does not fit the backbone: it lacks {some(least or list(names))}, and has "
            f"{some(list(keys))}. Choose the backbone that it was made with, or another checkpoint."
        )
    return renamed(bare, in_file), selected(bare, table(architecture).head_keys(keys))


def _before(checkpoint: Checkpoint) -> str:
    """What stands before the names of the CLIP."""
    for first in FIRST:
        matches = filter(None, (first.fullmatch(key) for key in checkpoint.specs()))
        if before := sorted({match[1] for match in matches}):
            if len(before) > 1:
                names = some([prefix or "no prefix" for prefix in before])
                raise UserError(
                    f"{checkpoint.name} holds {len(before)} CLIPs, behind {names}. Which one is meant is not guessed: "
                    f"save it alone."
                )
            return before[0]
    return ""


def _below(checkpoint: Checkpoint, before: str) -> Checkpoint:
    if not before:
        return checkpoint
    if beside := sorted(key for key in checkpoint.specs() if not key.startswith(before)):
        raise UserError(
            f"{checkpoint.name} has a CLIP behind {before}, and beside it {some(beside)}, which is no part of a CLIP. "
            f"Save the CLIP alone, without heads, losses and metrics."
        )
    names = {key: key.removeprefix(before) for key in checkpoint.specs()}
    return renamed(checkpoint, names, (f"names without {before}",))


def _without_numbers(checkpoint: Checkpoint) -> Checkpoint:
    specs = checkpoint.specs()
    numbers = [key for key in NUMBERS if key in specs and not specs[key].shape]
    names = {key: key for key in specs if key not in numbers}
    remark = f"without {', '.join(numbers)}, as in OpenAI's own files"
    return renamed(checkpoint, names, (remark,)) if numbers else checkpoint
