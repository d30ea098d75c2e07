"""What a run is going to fetch and how long it will take, said before it begins."""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.errors import UserError
from merging.files import room

if TYPE_CHECKING:  # importing them imports torch
    from launchers.saves import Save
    from merging.backbones.base import Backbone
    from merging.experts import Experts
    from tasks.engine import Engine
    from tasks.suite import Suite

GB = 1e9
PROCESS = 6 * 10**8  # bytes of Python with torch
PROBE = 8  # images run through a random tower to know its speed
SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices by whose product a device's speed is measured
log = logging.getLogger(__name__)


def foresee(suite: "Suite", source: Any, backbone: "Backbone", engine: "Engine", splits: Sequence[str]) -> None:
    """Log what is to be downloaded and decoded, the memory of a large model, and how long scoring takes.

    Nothing is said of what is made or cached here. Raises UserError where a file is missing from its
    repository, where a disk or the memory is too small, and as a task's `check`.
    """
    numbers = fits(backbone, engine)
    for task in suite.every:
        if hasattr(task, "check"):
            task.check(backbone, splits if task in suite.tasks else splits[:1])  # type: ignore[attr-defined]
    data: list[Any] = [own for task in suite.every if hasattr(own := getattr(task, "data", None), "files")]
    files = [*getattr(source, "downloads", lambda *_: [])(suite, backbone)]
    files += [file for some in data for file in some.files(splits)]
    if downloads(files) and data:
        duration(suite, backbone, engine)
    tasks: list[Any] = [task for task in suite.every if hasattr(task, "needs")]
    if needs := [need for task in tasks for need in task.needs(splits)]:
        decoding([need for need in needs if need.kind != "model"], Path(tasks[0].data.store.images))
        duration(suite, backbone, engine)
    if any(hasattr(task, "reads") for task in suite.every):
        reading(suite, backbone, engine, numbers, splits)


def fits(backbone: "Backbone", engine: "Engine") -> int:
    """The number of parameters; of a large model also what one takes in memory is logged.

    A module stands on the device, and beside it on the CPU the merged weights, fp32 until they are put into it. Raises
    UserError where there is less memory.
    """
    import torch

    with torch.device("meta"):
        tensors = [tensor for _, tensor in backbone.build().named_parameters()]
    numbers, module = sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    host, device = 4 * numbers, engine.torch_device
    needs = {device.type: module, "cpu": host} if device.type != "cpu" else {"cpu": module + host}
    if module < GB:
        return numbers
    free = {where: available(where, device) for where in needs}
    parts = [f"{need / GB:.1f} of {free[where] / GB:.1f} GB free ({where})" for where, need in needs.items()]
    log.info(f"one model has {numbers / GB:.2f} billion parameters and needs {' and '.join(parts)}")
    if short := [part for (where, need), part in zip(needs.items(), parts, strict=True) if need > free[where]]:
        raise UserError(
            f"{backbone.name} does not fit into memory: it needs {short[0]}. Take a machine with more, or a smaller "
            f"backbone; merging alone, without scores, streams its weights: suite=none."
        )
    return numbers


def available(where: str, device: Any) -> float:
    """Bytes of memory that are free on the device or, for "cpu", on this machine; infinite where it does not say."""
    import torch

    return (memory() or math.inf) if where == "cpu" else torch.cuda.mem_get_info(device)[0]


def check_learning(suite: "Suite", method: Any, router: Any) -> None:
    """Raises UserError for what learns from labels or predictions, or has no gating weights of one prompt, where tasks
    give prompts alone.
    """
    from merging.context import needs_of
    from merging.fit.descent import Descent, terms_of
    from merging.fit.objectives import FeatureDistillation
    from merging.preflight import some
    from tasks.lm_eval.task import check_gate

    if not (bare := [task.name for task in suite.tasks if getattr(task, "prompts_only", False)]):
        return
    check_gate(getattr(router, "gate", None))
    terms = terms_of(method, router)
    read = dict.fromkeys(term.name for term in terms if not isinstance(term, FeatureDistillation))
    if needs_of(method) != "labels" and not read:
        return
    learner = f"router={router.name}" if isinstance(getattr(router, "train", None), Descent) else type(method).__name__
    what = f"a model's predictions ({some([*read])})" if read else "labels"
    raise UserError(
        f"{learner} learns from {what}, and {some(bare)} give prompts alone: lm-eval keeps the answers and judges them "
        f"itself. Choose a method that needs weights or inputs, such as ties or reg_mean, and gates that learn from "
        f"which task a prompt comes, router=task_id."
    )


def downloads(files: list[Any]) -> list[Any]:
    """The files of base, experts and data that are not cached. Raises UserError unless they fit on the disk."""
    from merging.preflight import some
    from tasks.hub import check_room, plan

    if missing := [file for file in plan(files) if not file.cached]:
        check_room(missing)
        sizes = [file.bytes for file in missing]
        known = f"{sum(size or 0 for size in sizes) / GB:.2f} GB" + (" or more" if None in sizes else "")
        names = some([file.name for file in missing])
        log.info("to download: %d files, %s, into %s: %s", len(missing), known, missing[0].where, names)
    return missing


def decoding(needs: list[Any], folder: Path) -> None:
    """The images that are not decoded yet. Raises UserError unless they fit on the disk."""
    from merging.preflight import some

    if not needs:
        return
    total, images = sum(need.bytes for need in needs), sum(need.images for need in needs)
    count = f"{images:,} images, {total / GB:.2f} GB" if images else "images whose number is not known yet"
    log.info("to decode, once: %s into %s, from %s", count, folder, some([need.where for need in needs]))
    if total > (free := room(folder)[1]):
        raise UserError(
            f"{folder} has {free / GB:.1f} GB free, the decoded images need {total / GB:.1f} GB. Free some space, name "
            f"a folder on a larger disk with suite.store.images, or take fewer images with suite.limit."
        )


def resources(method: object, experts: "Experts", save: "Save") -> None:
    """Log what a merge takes of disk and memory. Raises UserError where there is clearly too little memory."""
    count = sum(spec.shape.numel() for spec in experts.specs().values())
    need, have = memory_of(method, experts), memory()
    base = Path(experts.origin.name)
    base = base.parent if base.name.startswith("model.safetensors") else base  # a folder is named, not its index
    log.info(
        f"merging {', '.join(experts.tasks)} onto {base}: {count:,} parameters; "
        f"{save.size(experts) / GB:.2f} GB into {save.path}, {room(save.path)[1] / GB:.2f} GB are free; memory from "
        f"{need / GB:.1f} GB" + ("" if have is None else f", {have / GB:.1f} GB are free")
    )
    if have is not None and need > have:
        raise UserError(
            f"{type(method).__name__} takes {need / GB:.1f} GB of memory at least for {count:,} parameters, and "
            f"{have / GB:.1f} GB are free. Merge on a machine with more, or by a method that keeps no changes in "
            f"memory: average, task_arithmetic, ties or dare."
        )


def memory_of(method: object, experts: "Experts") -> int:
    """Bytes that a merge takes at least: Python with torch, and the fp32 changes of a model unless they are streamed.

    Matrix by matrix, the largest one of all experts, the sum and the result lie beside them.
    """
    from merging.context import nested
    from merging.entries import kept

    sizes = [spec.shape.numel() for spec in experts.specs().values()]
    if all(getattr(part, "streams", False) for part in nested(method)):
        return PROCESS + (4 * sum(sizes) if kept(experts) else 0)
    return PROCESS + 4 * (sum(sizes) + (len(experts.tasks) + 2) * max(sizes, default=0))


def memory() -> int | None:
    """Bytes that are free for a process, swap included; None where the system does not say."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(1024 * int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (OSError, ValueError, KeyError):
        return None


def duration(suite: "Suite", backbone: "Backbone", engine: "Engine") -> None:
    """How long one model takes on the test images and on those of validation, by a measured speed."""
    test, val = (sum(expected(task, split) for task in suite.every) for split in ("test", "val"))
    if test:
        asked = any(hasattr(task, "reading") for task in suite.every)  # answers take time beside the prompts
        how, rate = (
            "at least" if asked else "about",
            speed(backbone, engine, backbone.outputs if asked else backbone.features),
        )
        log.info(
            f"one model takes {how} {spoken(test / rate)} for {test:,} test samples, {spoken(val / rate)} for {val:,} "
            f"of validation (each coefficient that is tried): {rate:.0f} samples a second on {engine.torch_device}"
        )


def reading(suite: "Suite", backbone: "Backbone", engine: "Engine", numbers: int, splits: Sequence[str]) -> None:
    """How long one model reads the prompts of what is scored and of validation, by the speed of a matrix product."""
    rate = products(engine) / numbers
    for split in [split for split in splits if split != "calibration"]:
        tokens = sum(task.reads(split, backbone) for task in suite.every)  # type: ignore[attr-defined]
        log.info(
            f"one model takes at least {spoken(tokens / rate)} to read the {tokens:,} tokens of {split}, answers left "
            f"out: {rate:,.0f} tokens a second on {engine.torch_device}"
        )


def products(engine: "Engine") -> float:
    """Multiply-accumulates per second of a product of large matrices: the best of three after a first one."""
    import torch

    side = SIDE[engine.torch_device.type]
    matrix = torch.ones(side, side, device=engine.torch_device)
    seconds = []
    with torch.inference_mode(), engine.running():
        for _ in range(4):
            begin = time.perf_counter()
            (matrix @ matrix)[0, 0].item()
            seconds.append(time.perf_counter() - begin)
    return side**3 / min(seconds[1:])


def expected(task: Any, split: str) -> int:
    """Samples of a split by published sizes, 0 for a task about which nothing is published."""
    if hasattr(task.data, "expected"):
        return task.data.expected(split)
    known = getattr(task.data, "known", None)
    return 0 if known is None else len(task.data.rule.choose(split, known.sizes.get, task.name).indices)


def speed(backbone: "Backbone", engine: "Engine", read: Any) -> float:
    """Samples per second that are read of the static model: the best of three batches after a first one."""
    import torch

    from tasks.split import mapped

    module, inputs = (
        backbone.build().to(engine.torch_device),
        backbone.prepare(mapped(lambda tensor: tensor.to(engine.torch_device), backbone.example(PROBE))),
    )
    seconds = []
    with torch.inference_mode(), engine.running():
        for _ in range(4):
            begin = time.perf_counter()
            read(module, inputs).sum().item()
            seconds.append(time.perf_counter() - begin)
    return PROBE / min(seconds)


def spoken(seconds: float) -> str:
    """A duration as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
