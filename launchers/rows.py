"""Rows: what one cell of the grid (one method on one suite) leaves behind, a strict JSON file each."""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from launchers import json_place, row_check
from launchers.json_place import Damaged
from merging.errors import UserError
from merging.files import write_atomically

log = logging.getLogger(__name__)
PLACES = {"suite": ("sources", "text"), "experts": ("base", "experts", "multitask", "paths")}  # options that name files


@dataclass(frozen=True)
class Row:
    """One method on one suite, with everything needed to trust, repeat or compare the numbers."""

    run_id: str  # 12 hex digits of config, checkpoints and contents, see run_id()
    status: str  # "ok" | "error"
    method: str  # label in tables: "ties", "base", "expert", ...
    config: dict[str, Any]  # the resolved Hydra config
    suite: str
    tasks: list[str]
    accuracy: dict[str, float]  # task -> fraction in [0, 1] on the split that `splits` names
    validation: dict[str, float] | None  # the same on validation at the chosen scale; None without a search
    scale: float | None
    scale_source: str  # "fixed" | "search:val" | "-"
    needs: str  # what the method asks for besides weights: "nothing" | "inputs" | "labels"
    router: str  # "none" | "oracle" | ...
    granularity: str  # "none" | "sample" | ...
    family: str  # where base and experts come from
    checkpoints: dict[str, str]  # "base" and every task -> content id
    splits: dict[str, dict[str, Any]]  # task -> {"name": "test", "id": fingerprint, "size": images}
    seed: int
    code: str  # git commit or version
    stored_bytes: int  # everything that must be stored to use the merged model, the base included
    macs: int  # multiply-accumulates per sample
    seconds: dict[str, float]  # "merge", "search", "router", "score"
    created: str  # ISO time, UTC
    error: str | None = None
    adaptation: str = "none"  # the split whose unlabelled images the method or its router saw; "test" is transductive
    opened: dict[str, list[str]] = field(
        default_factory=dict
    )  # split -> who looked at it before the score; empty: none
    params: int = 0  # numbers stored for what is mixed and for the gates
    routing: dict[str, Any] = field(
        default_factory=dict
    )  # "matrix" true task x mean weight, "accuracy" per task, "unseen"
    energy: dict[str, list[float]] = field(default_factory=dict)  # parameter -> share of each task vector's energy
    collapsed: list[str] = field(default_factory=list)  # tasks that the collapse guard suspects
    remarks: list[str] = field(default_factory=list)  # what a table with these experts must say
    search: dict[str, Any] = field(
        default_factory=dict
    )  # for the scale: its criterion, the scales listed, how many scored
    contents: dict[str, dict[str, str]] = field(default_factory=dict)  # task -> "head" or split that is read -> id
    similarity: list[list[float]] = field(default_factory=list)  # of an expert row: cosines between task vectors
    unseen: dict[str, float | None] = field(default_factory=dict)  # held-out task -> accuracy; None: no part for it

    def problem(self) -> str | None:
        """What makes this row unusable, or None."""
        found = row_check.problem(self)
        return found.said if found else None


def run_id(
    config: Mapping[str, Any],
    checkpoints: Mapping[str, str],
    contents: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """Name a cell by content: 12 hex digits of SHA-256 over the resolved config and the ids of weights and images.

    The order of keys does not matter, nor do the options that say where weights and images lie (PLACES): their ids
    count. Pass only what changes the numbers: no output folders, no tracker.
    """
    plain = {name: _without(part, PLACES.get(name, ())) for name, part in config.items()}
    cell = {"config": plain, "checkpoints": checkpoints, "contents": contents or {}}
    text = _strict_json(cell, "the config of this run", sort_keys=True)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:12]


def _without(part: Any, names: Sequence[str]) -> Any:
    return {key: value for key, value in part.items() if key not in names} if isinstance(part, Mapping) else part


def write(row: Row, folder: str | Path) -> Path:
    """Write `<folder>/<run_id>.json` atomically and return its path. Raises UserError (NaN, disk, bad row)."""
    path = Path(folder) / f"{row.run_id}.json"
    if problem := row.problem():
        raise UserError(f"The row {row.method} on {row.suite} ({path}) was not written: {problem}.")
    text = _strict_json(asdict(row), f"the row {row.method} on {row.suite}", indent=1)
    content = f"{text}\n".encode(errors="backslashreplace")  # a path that is no UTF-8, in JSON's own spelling
    return write_atomically(path, lambda file: file.write(content))


def read(paths: str | Path | Iterable[str | Path]) -> list[Row]:
    """Rows of files and folders (`*.json`), oldest first; a damaged file is named in a warning and left out.

    Raises UserError for a path that does not exist.
    """
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    rows = [row for path in listed for file in _files(Path(path)) if (row := _load(file)) is not None]
    return sorted(rows, key=lambda row: (row.created, row.run_id))


def find(folder: str | Path, run_id: str, level: int = logging.WARNING) -> Row | None:
    """The finished row of this run, or None when it is missing, failed or damaged, which is logged at `level`."""
    path = Path(folder) / f"{run_id}.json"
    row = _load(path, level) if path.exists() else None
    return row if row is not None and row.status == "ok" and row.run_id == run_id else None


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.json"))
    if path.exists():
        return [path]
    raise UserError(f"There are no rows at {path}: no such file or folder. Name row files or a folder of them.")


def _load(path: Path, level: int = logging.WARNING) -> Row | None:
    try:
        return _parsed(path.read_bytes())
    except OSError as error:
        log.log(level, "skipped the row file %s: %s", path, error.strerror or error)
    except Damaged as error:
        log.log(level, "skipped the damaged row file %s: %s", path, error)
    return None


def _parsed(content: bytes) -> Row:
    """The row. Raises Damaged, with line and column wherever one place is to blame."""
    found = json_place.parse(content)
    if not isinstance(found, dict):
        raise Damaged(f"a row is a mapping, not a {type(found).__name__}", (1, 1))
    text, known = content.decode(), {each.name: each for each in fields(Row)}
    for name in found.keys() - known.keys():
        raise Damaged(f"unknown field {name!r}", json_place.place(text, [name]))
    missing = [name for name, each in known.items() if name not in found and each.default is each.default_factory]
    if missing:
        raise Damaged(f"no {', '.join(missing)}")
    row = Row(**found)
    if wrong := row_check.problem(row):
        raise Damaged(wrong.said, json_place.place(text, wrong.where))
    return row


def _strict_json(content: Any, what: str, **options: Any) -> str:
    try:
        return json.dumps(content, allow_nan=False, ensure_ascii=False, **options)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"Cannot write {what} as JSON: {_culprit(content) or error}. "
            "Only finite numbers, text, booleans, null, lists and mappings may stand there."
        ) from error


def _culprit(content: Any, where: str = "") -> str | None:
    """The dotted name of the first value that JSON has no word for."""
    if isinstance(content, Mapping):
        parts = list(content.items())
    elif isinstance(content, (list, tuple)):
        parts = list(enumerate(content))
    else:
        fits = content is None or isinstance(content, (str, bool, int))
        fits = fits or (isinstance(content, float) and math.isfinite(content))
        return None if fits else f"{where or 'the value'} is {content!r}"
    found = (_culprit(value, f"{where}.{name}".lstrip(".")) for name, value in parts)
    return next((culprit for culprit in found if culprit), None)
