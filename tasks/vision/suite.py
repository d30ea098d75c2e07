"""Suites of real images: the published benchmark and a user's own data sets."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from merging.cache import Cache
from merging.errors import UserError
from merging.preflight import some
from tasks.heads.text import TextHead
from tasks.suite import Suite, divided, unread
from tasks.vision.data import Store, VisionData, VisionTask
from tasks.vision.dataset_registry import DEFAULT, facts, names, published_copy
from tasks.vision.layout import USUAL, part_of
from tasks.vision.parts import Rule
from tasks.vision.sources import OPTIONS, open_source

TEMPLATES = ("a photo of a {}.",)
OWN = ("classes", "templates", "test_share", "metrics")  # of a task in suite.sources, beside where its images lie
log = logging.getLogger(__name__)


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
    listed, tower = plain(sources or {}), plain(text)
    rule = Rule(val, calibration, limit, seed=seed)
    head = lambda prompts: None if tower is None else TextHead(tower, prompts, quick_gelu, store.cache)  # noqa: E731
    chosen = tuple(listed) if tasks is None else tuple(tasks)
    if others := unread("suite.sources", listed, chosen):
        log.info("suite.sources: suite.tasks leaves out %s", some(others))
    made = [make(task, variant, listed.get(task), rule, size, store, head) for task in chosen]
    return divided(name, made, held_out)


def make(
    task: str, variant: str, source: Mapping[str, Any] | None, rule: Rule, size: int, store: Store,
    head: Callable[[tuple[str, ...]], TextHead | None],
) -> VisionTask:  # fmt: skip
    """One task: what is published about it, overridden by what the user says in `source`."""
    known = facts(task, variant) if source is None or task in names() else None
    source = source or {}
    if extra := sorted(set(source) - OPTIONS - set(OWN)):
        known_options = ", ".join(sorted(OPTIONS.union(OWN)))
        raise UserError(f"suite.sources.{task} has {', '.join(extra)}, which is no option. Known are {known_options}.")
    where = {key: value for key, value in source.items() if key not in OWN}
    if not where and known is not None:
        where = published_copy(known)
    check_parts(task, where)
    images = open_source(task, where, Cache(store.cache))
    classes = source.get("classes", None if known is None else known.classes)
    templates = source.get("templates", TEMPLATES if known is None else known.templates)
    rule = replace(rule, test_share=source.get("test_share", rule.test_share))
    data = VisionData(task, images, known, None if classes is None else tuple(classes), rule, size, store)
    return VisionTask(task, data, head(tuple(templates)), tuple(source.get("metrics", ("accuracy",))))


def check_parts(task: str, where: Mapping[str, Any]) -> None:
    """Raises UserError for parquet files under a name that no part is read from."""
    files = where.get("parquet")
    named = [name for part in USUAL if isinstance(name := where.get(part), str)]
    known = [*(name for names in USUAL.values() for name in names), *named]
    splits = files if isinstance(files, Mapping) else ()
    if extra := sorted(name for name in splits if name not in known and part_of(name) is None):
        raise UserError(
            f"suite.sources.{task}.parquet has {', '.join(extra)}, from which nothing is read. Call the parts "
            f"{', '.join(known)}, or say which one it is: suite.sources.{task}.train={extra[0]}."
        )


def plain(value: Any) -> Any:
    """Nested mappings and lists of any kind as dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
