"""Compares rows and saved models of mini8 with the numbers in fixtures/guard; `make guard` computes the rows first.

    python tests/guard.py --commands               # what computes the rows, into outputs/guard
    python tests/guard.py outputs/guard/results    # rows, task by task
    python tests/guard.py --models models/*        # models that `save=` wrote with the stored rows, image by image

mini8.json holds per row its method, router, seed and steps of training, the scale, the size of the result (bytes,
params, macs), the number of right images of every task, and its ties: [image, class, runner-up, gap] where the two
highest logits are less than 1e-4 apart. mini8.npz holds the labels and, per row, the predicted class of every test
image, task after task.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

FIXTURES = Path(__file__).parent / "fixtures" / "guard"
MORE = (
    "duet_dynamic,duet_svd,duet_svd_static,e_wemoe,neuron_mask,neuron_mask_ties,single,smile_128,tall_mask,"
    "twin_pretrain,twin_single,rank_one_moe"
)
DESCENT = (
    "entropy_short,entropy_global,distillation,task_id_distillation,task_id_entropy,entropy,entropy_transductive,"
    "rank_one"
)
COMMANDS = f"""
duet experiment=mini8 scale.seconds=null output=outputs/guard
duet -m method={MORE} scale.seconds=null output=outputs/guard
duet method=twin_all router=twin output=outputs/guard
duet -m method=duet_all router=oracle,twin,task_id_early output=outputs/guard
duet -m method=duet_all router={DESCENT} router.train.steps=20 output=outputs/guard
"""
RETRAINED = 2  # images of a task by which gates that are trained again may differ


def name(row: dict[str, Any]) -> str:
    """What a stored or new row has to share with the other."""
    steps = "" if row["steps"] is None else f" {row['steps']} steps"
    return f"{row['method']} router={row['router']}{steps} seed={row['seed']}"


def read(path: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """A new row as the fixtures have it."""
    row = json.loads(path.read_text())
    scores = row["accuracy"] if "accuracy" in row else {task: score["value"] for task, score in row["scores"].items()}
    train = (row["config"].get("router") or {}).get("train") or {}
    kept = {key: row[key] for key in ("method", "router", "seed", "scale", "params", "macs", "created")}
    right = {task: round(scores[task] * size) for task, size in sizes.items() if task in scores}
    return {**kept, "bytes": row["stored_bytes"], "steps": train.get("steps"), "right": right}


def row_differences(stored: dict[str, Any], row: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """What differs, and whether that is allowed: a tie, or two images where gates were trained again."""
    if stored["scale"] != row["scale"]:
        yield f"scale {row['scale']} instead of {stored['scale']}", False
    for size in ("bytes", "params", "macs"):
        if stored[size] != row[size]:
            yield f"{size} {row[size]} instead of {stored[size]}", True
    for task, right in stored["right"].items():
        if task not in row["right"]:
            yield f"{task} has no score", False
        elif change := row["right"][task] - right:
            ties = stored["ties"].get(task, [])
            allowed = abs(change) <= (RETRAINED if stored["learned"] else min(1, len(ties)))
            yield f"{task} {change:+d} images, ties {ties}", allowed


@torch.inference_mode()
def predictions(path: Path) -> np.ndarray:
    """The predicted class of every test image of mini8, task after task."""
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate

    from merging import load, open_merged

    with initialize_config_module("conf", version_base="1.3"):
        config = compose("config", ["suite=mini8"])
    suite, backbone = instantiate(config.suite), instantiate(config.backbone, _convert_="all")
    merged, model, predicted = open_merged(path), load(path), []
    oracle = merged.routing is not None and merged.routing.by_task
    for index, task in enumerate(suite.tasks):
        given = {"w": merged.one_hot(index)} if oracle else {}
        for images in task.split("test").inputs.split(config.engine.batch):
            outputs = task.head()(model(backbone.prepare(images), **given))
            predicted.append(task.decide(outputs)["predicted"])
    return torch.cat(predicted).numpy().astype(np.uint8)


def model_differences(path: Path, fixture: dict[str, Any], classes: np.ndarray) -> Iterator[tuple[str, bool]]:
    """The images that a saved model classifies otherwise than it did when it was scored; allowed where they tie."""
    from merging import open_merged

    run_id = open_merged(path).provenance["run_id"]
    index = next((i for i, row in enumerate(fixture["rows"]) if row["run_id"] == run_id), None)
    if index is None:
        yield f"no stored row has the id {run_id} of this file", True
        return
    ties, start, now = fixture["rows"][index]["ties"], 0, predictions(path)
    for task, size in fixture["images"].items():
        for image in np.flatnonzero(now[start : start + size] != classes[index, start : start + size]):
            tied = [tie for tie in ties.get(task, []) if tie[0] == image]
            changed = f"{classes[index, start + image]} -> {now[start + image]}"
            yield f"{task} image {image}: class {changed}, ties {tied}", bool(tied)
        start += size


def report(title: str, differences: Iterator[tuple[str, bool]]) -> bool:
    """Print what differs; whether all of it is allowed."""
    listed = list(differences)
    for text, allowed in listed:
        print(f"{title}: {text}{' (allowed)' if allowed else ' (NOT ALLOWED)'}", flush=True)
    if not listed:
        print(f"{title}: equal", flush=True)
    return all(allowed for _, allowed in listed)


def compare_rows(folder: Path, fixture: dict[str, Any]) -> bool:
    """Whether all rows of mini8 in the folder agree with the stored ones of the same name, which are printed."""
    rows = [read(path, fixture["images"]) for path in sorted(folder.glob("*.json"))]
    newest = {name(row): row for row in sorted(rows, key=lambda row: row["created"])}
    good, missing = True, []
    for stored in fixture["rows"]:
        if (row := newest.get(name(stored))) is None:
            missing.append(name(stored))
        else:
            good &= report(name(stored), row_differences(stored, row))
    print(f"{len(fixture['rows']) - len(missing)} rows compared, {len(missing)} not there: {', '.join(missing) or '-'}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path("outputs/guard/results"), help="folder of rows")
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="compare saved models instead of rows")
    parser.add_argument("--commands", action="store_true", help="print the commands that compute the rows")
    given = parser.parse_args()
    if given.commands:
        print(COMMANDS)
        return
    fixture = json.loads((FIXTURES / "mini8.json").read_text())
    classes, good = np.load(FIXTURES / "mini8.npz")["predicted"], True
    for path in given.models:
        good &= report(path.stem, model_differences(path, fixture, classes))
    if not given.models:
        good = compare_rows(given.results, fixture)
    sys.exit(not good)


if __name__ == "__main__":
    main()
