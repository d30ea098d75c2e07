"""Suites of real images: the published benchmark and a user's own data sets."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from merging.cache import Cache
from merging.errors import UserError
from merging.preflight import some
from tasks.heads.text import TextHead
from tasks.suite import Suite, divided, unread
from tasks.vision.data import Store, VisionData, VisionTask
from tasks.vision.dataset_registry import DEFAULT, Facts, facts, names
from tasks.vision.layout import USUAL, part_of
from tasks.vision.parts import Rule
from tasks.vision.sources import Location

TEMPLATES = ("a photo of a {}.",)
log = logging.getLogger(__name__)
OWN = ("classes", "templates", "test_share", "metrics")  # of a task in suite.sources, beside where its images lie


def build(
    name: str,
    tasks: Sequence[str] | None,
    store: Store,
    text: str | Mapping[str, str | None] | None,
    size: int = 224,
    quick_gelu: bool = True,
    variant: str = DEFAULT,
    sources: Mapping[str, Mapping] | None = None,
    val: int = 5000,
    calibration: int = 1024,
    limit: int | None = None,
    seed: int = 0,
    held_out: Sequence[str] = (),
) -> Suite:
    """The suite of the named tasks (None: all of `sources`); see conf/suite/folder.yaml for the options.

    Raises UserError for tasks that neither the published facts nor `sources` know, and for unknown keys.
    """
    own = {task: plain(each) for task, each in (sources or {}).items()}
    rule = Rule(val, calibration, limit, seed=seed)
    words = plain(text)
    reads = lambda prompts: None if words is None else TextHead(words, prompts, quick_gelu, store.cache)  # noqa: E731
    chosen = tuple(own) if tasks is None else tuple(tasks)
    if others := unread("suite.sources", own, chosen):
        log.info("suite.sources: suite.tasks leaves out %s", some(others))
    return divided(name, [make(task, variant, own.get(task), rule, size, store, reads) for task in chosen], held_out)


def make(
    task: str,
    variant: str,
    own: Mapping[str, Any] | None,
    rule: Rule,
    size: int,
    store: Store,
    reads: Callable[[tuple[str, ...]], TextHead | None],
) -> VisionTask:
    """One task: what is published about it, overridden by what the user says."""
    known = facts(task, variant) if own is None or task in names() else None
    own = own or {}
    allowed = {each.name for each in fields(Location)} | set(OWN)
    if extra := sorted(set(own) - allowed):
        raise UserError(
            f"suite.sources.{task} has {', '.join(extra)}, which is no option. Known are {', '.join(sorted(allowed))}."
        )
    where = {key: value for key, value in own.items() if key not in OWN}
    if not where and known is not None:
        where = published(known)
    where["args"] = tuple(where.get("args", ()))
    if isinstance(where.get("parquet"), Mapping):
        check_parts(task, where)
    classes = own.get("classes", None if known is None else known.classes)
    templates = own.get("templates", TEMPLATES if known is None else known.templates)
    if "test_share" in own:
        rule = replace(rule, test_share=own["test_share"])
    source = Location(**where).open(task, Cache(store.cache))
    data = VisionData(task, source, known, None if classes is None else tuple(classes), rule, size, store)
    return VisionTask(task, data, reads(tuple(templates)), tuple(own.get("metrics", ("accuracy",))))


def check_parts(task: str, where: Mapping[str, Any]) -> None:
    """Raises UserError for parquet files under a name that no part is read from."""
    named = [where.get(part) for part in USUAL]
    known = [*(name for names in USUAL.values() for name in names), *(name for name in named if isinstance(name, str))]
    if extra := sorted(name for name in where["parquet"] if name not in known and part_of(name) is None):
        raise UserError(
            f"suite.sources.{task}.parquet has {', '.join(extra)}, from which nothing is read. Call the parts "
            f"{', '.join(known)}, or say which one it is: suite.sources.{task}.train={extra[0]}."
        )


def published(known: Facts) -> dict[str, Any]:
    """Where the published copy lies; validation is drawn from train even where a part for it is there."""
    if known.hub is None:
        raise UserError(
            f"{known.name} of {known.variant} has no known copy on the Hub. Say where yours lies: "
            f"+suite.sources.{known.name}.folder=<folder>."
        )
    rest = {key: value for key, value in known.hub.items() if key != "id"}
    return {"hub": known.hub["id"], "val": False, **rest}


def plain(value: Any) -> Any:
    """Nested mappings and lists of any kind as dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
