"""One Hydra job, and the life of a row: configuration -> cell and run id -> found, or claimed -> computed -> file."""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from launchers import rows
from launchers.callback import LISTED, draw
from launchers.cells import Cell, OnTask, Setup, splits_read
from launchers.claims import Taken, claim, owner
from launchers.found import ELSEWHERE, FOUND, cache_of, is_local, named, remember, state
from launchers.preflight import check_learning, foresee
from launchers.rows import Row
from launchers.saves import Save, save_of
from launchers.sweeps.axes import group_of
from launchers.tracking.tracker import Tracker
from merging.backbones.base import Backbone
from merging.cache import Cache
from merging.checkpoints import Checkpoint, Known
from merging.context import Context, Log, nested, silent
from merging.errors import UserError
from merging.experts import Experts
from merging.files import write_text
from merging.fit.gates import Oracle, Router
from merging.methods import Base, Expert, Multitask
from merging.methods.method import Method, check_count
from merging.owned import check_shared
from tasks.data import SuiteData
from tasks.evaluate import Grid
from tasks.scales import Fixed, Search
from tasks.suite import Suite

log = logging.getLogger(__name__)
DECIDES = ("backbone", "experts", "suite", "method", "scale", "router", "engine", "seed")  # what changes a number
REFERENCES = {"base": Base, "expert": Expert}
BUSY = "%s: being computed by %s; run the same command again for its row"


def run(config: DictConfig) -> list[str]:
    """One Hydra job: the base, the chosen method and the experts. Returns the row files."""
    folder, output_dir = Path(config.output) / "results", Path(HydraConfig.get().runtime.output_dir)
    save = save_of(config)
    with instantiate(config.tracker) as tracker:
        chosen = cell(config, HydraConfig.get().runtime.choices["method"])
        if save is not None:
            others = Known("", tuple(map(Path, sorted(named(config)))))  # a text tower, a model of all tasks
            check_shared(chosen.setup.experts.owned)
            save.check(chosen.setup.experts, chosen.method, [others])
        references = [cell(config, label, reference=True) for label in REFERENCES if label != chosen.label]
        ids = [member.run_id for member in (chosen, *references)]
        files = [str((folder / f"{run_id}.json").resolve()) for run_id in ids]
        write_text(output_dir / LISTED, json.dumps(files))
        if chosen.setup.files is not None:
            remember(config, chosen.setup.files, ids)
        if (holder := owner(folder, chosen.run_id)) is not None:
            log.info(BUSY, chosen.label, holder)
            return files
        title = f"{chosen.label} {chosen.setup.grid.suite.name}"
        tracker.start(chosen.config, chosen.run_id, title, group_of(HydraConfig.get()))
        beside = list(reference_rows(references, folder, tracker))
        save = save or wanted_by(tracker, chosen, folder, config.redo)
        try:
            row = finish(chosen, folder, tracker.log_task, config.redo, save, log_step=tracker.log)
        except Taken as taken:  # between the look and the claim
            log.info(BUSY, chosen.label, taken)
            return files
        shown = sorted([row, *beside], key=lambda row: row.created)
        tracker.finish(row, shown, draw(shown, output_dir) if tracker.pictures else {}, save and save.path)
    return files


def reference_rows(references: Iterable[Cell], folder: Path, tracker: Tracker) -> Iterator[Row]:
    """The rows of the reference cells, but for those that another process computes just now."""
    for reference in references:
        try:
            on_task = partial(tracker.log_task, method=reference.label)
            yield finish(reference, folder, on_task, found_level=logging.DEBUG)
        except Taken as taken:
            log.info(BUSY, reference.label, taken)


def wanted_by(tracker: Tracker, chosen: Cell, folder: Path, redo: bool) -> Save | None:
    """Where the tracker asks for the merged model, if there is no row yet."""
    computed = redo or rows.find(folder, chosen.run_id, logging.DEBUG) is None
    path = tracker.model_file(chosen.run_id) if computed and chosen.label not in REFERENCES else None
    return None if path is None else Save(path)


def finish(
    cell: Cell,
    folder: Path,
    on_task: OnTask,
    redo: bool = False,
    save: Save | None = None,
    found_level: int = logging.INFO,
    log_step: Log = silent,
) -> Row:
    """The cell's row: found if finished before, else computed by this process alone and written, its failure too.

    Raises Taken where another process computes it just now, and whatever the cell raises.
    """
    anew = redo or save is not None
    row = None if anew else rows.find(folder, cell.run_id)
    if row is None:
        with claim(folder, cell.run_id, " ".join([cell.label, *cell.overrides])):
            row = None if anew else rows.find(folder, cell.run_id, logging.DEBUG)  # finished since by another process
            if row is None:
                return _computed(cell, folder, lambda: cell.compute(on_task, save, log_step))
    log.log(found_level, FOUND, cell.label, folder / f"{cell.run_id}.json")
    journal = cell.journal.folder
    if (folder / f"{cell.run_id}.claim").exists() or (journal is not None and journal.exists()):
        with contextlib.suppress(Taken), claim(folder, cell.run_id):  # of one killed just after it wrote the row
            cell.journal.close()
    return row


def _computed(cell: Cell, folder: Path, compute: Callable[[], Row]) -> Row:
    """The row, written to its file. A failure is written too, unless a good row is there, then raised."""
    try:
        row = compute()
    except Exception as error:
        if rows.find(folder, cell.run_id, logging.DEBUG) is None:
            try:
                rows.write(replace(cell.row(), status="error", error=f"{type(error).__name__}: {error}"), folder)
            except UserError as unwritten:
                log.error("The failure of %s has no row: %s", cell.label, unwritten)
        raise
    rows.write(row, folder)
    cell.journal.close()
    return row


def cell(config: DictConfig, label: str, reference: bool = False) -> Cell:
    """The cell that the configuration names; or a `reference` beside it, the base or the experts on the same setup."""
    config = prepared(config, label, reference)
    decides = resolved(config)
    parts = built(config)
    setup = setup_of(config, decides, *parts, quiet=label == "base")
    if label == "base":  # how experts were read says nothing of it
        kept = tuple(remark for remark in setup.remarks if remark not in setup.experts.remarks)
        setup = replace(setup, remarks=kept)
    setup = replace(setup, gates=None) if config.redo else setup
    return Cell(label, *parts, decides, setup, overrides())


def built(config: DictConfig) -> tuple[Method, Fixed | Search, Router]:
    """The method, and who chooses its scale and its gating weights where it leaves that open."""
    method = instantiate(config.method, _convert_="all")
    scale = Fixed() if isinstance(method, (Base, Expert, Multitask)) else instantiate(config.scale)
    routed = any(getattr(part, "routed", False) for part in nested(method))
    return method, scale, instantiate(config.router, _convert_="all") if routed else Oracle()


def overrides() -> list[str]:
    """Those of this job that its rows depend on: the command that leads to them, and not where they are written."""
    return [override for override in HydraConfig.get().overrides.task
            if re.split("[.@=/]", override.lstrip("+~"))[0] not in ELSEWHERE]  # fmt: skip


def prepared(config: DictConfig, label: str, reference: bool = False) -> DictConfig:
    """The configuration of a row. No option of the run's own method touches a reference, and the base, which has no
    expert whose text tower could read the class names, keeps its own heads where the suite has such."""
    changed = config.copy()
    OmegaConf.set_struct(changed, False)
    if reference:
        changed.method, changed.save_dtype = {"_target_": f"merging.methods.{REFERENCES[label].__name__}"}, None
    if label == "base" and "heads" in config.experts and config.suite.get("text", "") is not None:
        changed.experts.heads = "suite"
    if changed.method["_target_"].endswith(".LinearProbe"):
        if "heads_from" not in config.experts:
            raise UserError("method=linear_probe needs experts with heads of their own, such as experts=gloss8.")
        changed.experts.heads_from = "base"
    return changed


def resolved(config: DictConfig) -> dict[str, Any]:
    """The part of the configuration that decides the numbers, as plain values."""
    parts = {name: config[name] for name in (*DECIDES, "split", "save_dtype")}
    decides: Any = {name: OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
                    for name, part in parts.items()}  # fmt: skip
    decides["experts"].pop("workers", None)
    decides["suite"].pop("store", None)
    decides["engine"].pop("device")
    if decides["method"]["_target_"].endswith((".Base", ".Expert", ".Multitask")):
        decides["scale"] = None
    if not routes(decides["method"]):
        decides["router"] = None  # what is static, or brings its own gate, is the same under every router
    if decides["split"] == "test":
        del decides["split"]
    if decides["save_dtype"] is None:
        del decides["save_dtype"]
    if config.probe and not decides["method"]["_target_"].endswith((".Expert", ".Multitask", ".LinearProbe")):
        decides["probe"] = True
    if ((decides["router"] or {}).get("gate") or {}).get("granularity") not in ("batch", "mixed"):
        decides["engine"].pop("batch")  # a sample then does not depend on those beside it
    return decides


def routes(method: dict[str, Any]) -> bool:
    """Whether a router weighs what a method's configuration makes, by an option or its class, or a method inside it."""
    own = "_target_" in method and method.get("routed", getattr(get_class(method["_target_"]), "routed", False))
    return bool(own) or any(routes(value) for value in method.values() if isinstance(value, dict))


def setup_of(
    config: DictConfig,
    decides: dict[str, Any],
    method: Method,
    scale: Fixed | Search,
    router: Router,
    quiet: bool = False,
) -> Setup:
    """Experts and grid of this backbone, suite and seed, shared by the jobs of one process."""
    engine = instantiate(config.engine)
    shared = [decides[name] for name in ("backbone", "experts", "suite")]
    key = json.dumps([config.output, repr(engine), *shared], sort_keys=True)
    known = _SETUPS.get(key)
    suite = instantiate(config.suite) if known is None else known.grid.suite
    check_learning(suite, method, router)
    check_count(method, len(suite.names))
    if known is None:
        store = cache_of(config)
        files = state(config)
        backbone = instantiate(config.backbone, _convert_="all")
        source = instantiate(config.experts)
        foresee(suite, source, backbone, engine, [config.split, *splits_read(method, scale, router)])
        suite = source.headed(suite, backbone, store) if hasattr(source, "headed") else suite
        data = SuiteData(suite, backbone, engine, partial(multitask_of, source, suite, backbone, store))
        experts, context = source.open(suite, backbone, store), Context(data, engine.torch_device)
        experts = replace(experts, device=engine.torch_device)
        unseen, more = of_unseen(source, suite, backbone, store)
        read = [*experts.remarks, *(() if unseen is None else unseen.remarks)]
        for remark in () if quiet else read:
            log.info("%s", remark)
        _SETUPS[key] = Setup(
            experts=experts,
            grid=Grid(suite, backbone, engine),
            source=source,
            context=context,
            unfinished=store.folder / "unfinished",
            remarks=(*getattr(source, "remarks", ()), *more, *dict.fromkeys(read)),
            gates=store,
            unseen=unseen,
            files=files if is_local(suite, source, backbone) else None,
        )
    return _SETUPS[key]


def of_unseen(source: Any, suite: Suite, backbone: Backbone, store: Cache) -> tuple[Experts | None, tuple[str, ...]]:
    """The held-out tasks' own experts, or why there are none: no method needs them, the expert row shows them."""
    if not suite.held_out:
        return None, ()
    try:
        return source.open(suite.unseen, backbone, store), ()
    except UserError as error:
        return None, (f"No expert row for {', '.join(suite.unseen.names)}, held out: {error}",)


def multitask_of(source: Any, suite: Suite, backbone: Backbone, store: Cache) -> Checkpoint:
    """The model trained on all tasks together. Raises UserError for published families, which have none."""
    if not hasattr(source, "open_multitask"):
        raise UserError(
            f"method=multitask is a model trained on the images of all tasks, and the family {source.family} has only "
            f"experts of one task each. Train it beside experts of your own (duet-finetune suite={suite.name}, then "
            f"again with multitask=true) and take both with experts=folder."
        )
    return source.open_multitask(suite, backbone, store)


_SETUPS: dict[str, Setup] = {}
