"""Pretrains the mini CLIP on drawn images and captions: `python -m tasks.mini.pretrain [file.safetensors]`.

Contrastive image-to-caption loss over the unique captions of a batch (Radford et al., 2021, arXiv 2103.00020, with
duplicates merged). Images are drawn fresh for every round, nearly all in the clean "web" style, a small share in the
style of the tasks, some with a wrong caption: the base has seen the concepts, not the data sets.
"""

import hashlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from merging.ops import generator
from tasks.mini.generate import CLASSES, render
from tasks.mini.model import BASE, TEMPLATES, build, load_base, prepare, tokenize


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the base; `steps` sets the schedule even when a run is cut short."""

    seed: int = 0
    steps: int = 3000
    batch: int = 128
    round: int = 1024  # images drawn per task before the next ones
    task_style: float = 0.001  # share of images in the look of the tasks
    wrong_captions: float = 0.05
    lr: float = 1.5e-3
    warmup: int = 200
    weight_decay: float = 0.05
    beta2: float = 0.98
    clip: float = 1.0
    max_scale: float = 50.0
    text: Literal["trained", "shipped"] = "trained"  # shipped: the base's text tower, as it is, for another image tower

    def rate(self, step: int) -> float:
        """Linear warm-up, then cosine to zero."""
        return self.lr * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def draw_round(recipe: Recipe, number: int) -> tuple[Tensor, Tensor]:
    """One shuffled round: uint8 images and global class ids (tasks in order, classes within)."""
    images, classes, first = [], [], 0
    for task, names in CLASSES.items():
        borrowed = round(recipe.task_style * recipe.round)
        for style, count in (("web", recipe.round - borrowed), ("task", borrowed)):
            drawn, labels = render(task, count, style, generator("pretrain", recipe.seed, number, task, style))
            images.append(drawn)
            classes.append(labels + first)
        first += len(names)
    order = torch.randperm(recipe.round * len(CLASSES), generator=generator("order", recipe.seed, number))
    return torch.cat(images)[order], torch.cat(classes)[order]


def loss_of(model: CLIP, images: Tensor, classes: Tensor, captions: list[str]) -> Tensor:
    """Cross entropy of every image against the unique captions of its batch."""
    unique, target = classes.unique(return_inverse=True)
    text = functional.normalize(model.encode_text(tokenize([captions[c] for c in unique])), dim=-1)
    image = functional.normalize(model.encode_image(prepare(images)), dim=-1)
    return functional.cross_entropy(model.logit_scale.exp() * image @ text.T, target)


def batches(recipe: Recipe):
    """(images, classes, captions) for ever: wrong captions and templates are drawn per batch."""
    names = [name for group in CLASSES.values() for name in group]
    number = 0
    while True:
        images, classes = draw_round(recipe, number)
        rng = generator("captions", recipe.seed, number)
        for picture, label in zip(images.split(recipe.batch), classes.split(recipe.batch), strict=True):
            wrong = torch.rand(len(label), generator=rng) < recipe.wrong_captions
            label = torch.where(wrong, torch.randint(len(names), label.shape, generator=rng), label)
            template = TEMPLATES[int(torch.randint(len(TEMPLATES), (), generator=rng))]
            yield picture, label, [template.format(name) for name in names]
        number += 1


def keep_text(model: CLIP) -> None:
    """Give a model the text tower and the temperature of the shipped base, which are then not trained."""
    shipped = load_base().state_dict()
    for name, parameter in model.named_parameters():
        if not name.startswith("visual."):
            parameter.requires_grad_(False).copy_(shipped[name])


def train(recipe: Recipe, stop_after: int | None = None) -> tuple[CLIP, list[float]]:
    """The model and the loss of every step; `stop_after` cuts the run short without changing its schedule."""
    torch.manual_seed(recipe.seed)
    model, losses = build(), []
    if recipe.text == "shipped":
        keep_text(model)
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learned if (p.ndim >= 2) == matrix], "weight_decay": decay}
              for matrix, decay in ((True, recipe.weight_decay), (False, 0.0))]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, recipe.beta2))
    for step, batch in zip(range(recipe.steps if stop_after is None else stop_after), batches(recipe), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(recipe.max_scale))
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}/{recipe.steps}  loss {losses[-1]:.3f}", file=sys.stderr)
    return model.eval(), losses


def save(model: CLIP, recipe: Recipe, losses: list[float], seconds: float, path: Path) -> None:
    """fp16 weights, and beside them the recipe, the first losses and the digest."""
    partial = path.with_suffix(".part")
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, partial, metadata={"recipe": json.dumps(asdict(recipe))})
    os.replace(partial, path)
    facts = {
        "recipe": asdict(recipe), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "first_losses": losses[:5],
        "last_loss": sum(losses[-100:]) / len(losses[-100:]), "seconds": round(seconds), "torch": torch.__version__,
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    start = time.perf_counter()
    pretrained = train(Recipe())
    save(pretrained[0], Recipe(), pretrained[1], time.perf_counter() - start, Path(*sys.argv[1:] or [BASE]))
