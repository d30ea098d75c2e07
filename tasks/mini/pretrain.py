"""Pretrains the mini CLIP on drawn images and captions: `python -m tasks.mini.pretrain`.

Contrastive image-to-caption loss over the unique captions of a batch (Radford et al., 2021, arXiv 2103.00020, with
duplicates merged). Images are drawn fresh for every round, nearly all in the clean "web" style, a small share in the
style of the tasks, some with a wrong caption: the base has seen the concepts, not the data sets.
"""

import argparse
import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from merging.ops import generator
from tasks.mini.generate import CLASSES, render
from tasks.mini.model import BASE, build, prepare
from tasks.mini.words import TEMPLATES, tokenize


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


def rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine to zero."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    return recipe.lr * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def train(recipe: Recipe, stop_after: int | None = None, report=None) -> tuple[CLIP, list[float]]:
    """The model and the loss of every step; `stop_after` cuts the run short without changing its schedule."""
    torch.manual_seed(recipe.seed)
    model = build()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, recipe.beta2))
    losses = []
    for step, batch in zip(range(recipe.steps if stop_after is None else stop_after), batches(recipe), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate(recipe, step)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, *batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(recipe.max_scale))
        losses.append(loss.item())
        if report and step % 50 == 0:
            report(step, losses, model)
    return model.eval(), losses


def save(model: CLIP, recipe: Recipe, losses: list[float], seconds: float, path: Path) -> None:
    """fp16 weights, and beside them the recipe, the first losses and the digest."""
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    partial = path.with_suffix(".part")
    save_file(weights, partial, metadata={"recipe": json.dumps(asdict(recipe))})
    os.replace(partial, path)
    facts = {
        "recipe": asdict(recipe),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "first_losses": losses[:5],
        "last_loss": sum(losses[-100:]) / len(losses[-100:]),
        "seconds": round(seconds),
        "torch": torch.__version__,
    }
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=BASE)
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    chosen = vars(parser.parse_args())
    output, start = chosen.pop("output"), time.perf_counter()
    recipe = Recipe(**chosen)

    def report(step: int, losses: list[float], model: CLIP) -> None:
        spent = time.perf_counter() - start
        recent = sum(losses[-50:]) / len(losses[-50:])
        print(f"step {step}/{recipe.steps}  loss {recent:.3f}  {spent:.0f} s", flush=True)

    model, losses = train(recipe, report=report)
    save(model, recipe, losses, time.perf_counter() - start, output)


if __name__ == "__main__":
    main()
