"""Rows: what one cell of the grid (one method on one suite) leaves behind, a strict JSON file each."""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from merging.errors import UserError
from merging.files import write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One method on one suite, with everything needed to trust, repeat or compare the numbers."""

    run_id: str  # 12 hex digits of config and checkpoints, see run_id()
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
    params: int = 0  # numbers stored for what is mixed and for the gates
    routing: dict[str, Any] = field(default_factory=dict)  # "matrix" true task x mean weight, "accuracy" per task
    energy: dict[str, list[float]] = field(default_factory=dict)  # parameter -> share of each task vector's energy
    collapsed: list[str] = field(default_factory=list)  # tasks that the collapse guard suspects
    remarks: list[str] = field(default_factory=list)  # what a table with these experts must say

    def problem(self) -> str | None:
        """What makes this row unusable, or None."""
        if self.status not in ("ok", "error"):
            return f"status is {self.status!r}, not 'ok' or 'error'"
        wrong = [name for name, kind in _KINDS.items() if not isinstance(getattr(self, name), kind)]
        if wrong:
            return f"wrong type in {', '.join(wrong)}"
        if self.status == "error":
            return None if self.error else "a failed row without its error"
        missing = [task for task in self.tasks if task not in self.accuracy]
        if missing or not self.tasks:
            return f"no accuracy for {', '.join(missing) or 'any task'}"
        scores = {**(self.validation or {}), **self.accuracy}
        odd = [task for task, score in scores.items() if not _is_fraction(score)]
        return f"accuracy outside 0..1 for {', '.join(odd)}" if odd else self._routing_problem()

    def _routing_problem(self) -> str | None:
        """What is wrong with what the gates and banks left behind."""
        if self.routing:
            matrix, right = self.routing.get("matrix"), self.routing.get("accuracy")
            count = len(self.tasks)
            lines = matrix if isinstance(matrix, list) else []
            if [len(line) if isinstance(line, list) else -1 for line in lines] != [count] * count:
                return f"the routing matrix is not {count} x {count}"
            if not all(map(_are_numbers, lines)):
                return "the routing matrix holds a weight that is no finite number"
            if not isinstance(right, dict) or set(right) != set(self.tasks):
                return "the routing accuracy is not one number a task"
            if odd := [task for task, share in right.items() if not _is_fraction(share)]:
                return f"routing accuracy outside 0..1 for {', '.join(odd)}"
        odd = [key for key, shares in self.energy.items() if not _are_numbers(shares)]
        return f"energy that is no finite number for {', '.join(odd)}" if odd else None


_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("run_id", "method", "suite", "scale_source", "needs", "router", "granularity"), str),
    **dict.fromkeys(("family", "code", "created", "adaptation"), str),
    **dict.fromkeys(("config", "accuracy", "checkpoints", "splits", "seconds", "routing", "energy"), dict),
    **dict.fromkeys(("seed", "stored_bytes", "macs", "params"), int),
    **dict.fromkeys(("tasks", "collapsed", "remarks"), list),
    "validation": (dict, type(None)),
    "scale": (float, int, type(None)),
    "error": (str, type(None)),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (float, int)) and math.isfinite(value)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_number, values))


def _is_fraction(score: Any) -> bool:
    return _is_number(score) and 0 <= score <= 1


def run_id(config: Mapping[str, Any], checkpoints: Mapping[str, str]) -> str:
    """Name a cell by content: 12 hex digits of SHA-256 over the resolved config and the checkpoint ids.

    The order of keys does not matter. Pass only what changes the numbers: no output folders, no tracker.
    """
    text = _strict_json({"config": config, "checkpoints": checkpoints}, "the config of this run", sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write(row: Row, folder: str | Path) -> Path:
    """Write `<folder>/<run_id>.json` atomically and return its path. Raises UserError (NaN, disk, bad row)."""
    path = Path(folder) / f"{row.run_id}.json"
    if problem := row.problem():
        raise UserError(f"The row {row.method} on {row.suite} ({path}) was not written: {problem}.")
    text = _strict_json(asdict(row), f"the row {row.method} on {row.suite}", indent=1)
    return write_text(path, text + "\n")


def read(paths: str | Path | Iterable[str | Path]) -> list[Row]:
    """Rows of files and folders (`*.json`), oldest first; a damaged file is named in a warning and left out.

    Raises UserError for a path that does not exist.
    """
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    rows = [row for path in listed for file in _files(Path(path)) if (row := _load(file)) is not None]
    return sorted(rows, key=lambda row: (row.created, row.run_id))


def find(folder: str | Path, run_id: str) -> Row | None:
    """The finished row of this run, or None when it is missing, failed or damaged."""
    path = Path(folder) / f"{run_id}.json"
    row = _load(path) if path.exists() else None
    return row if row is not None and row.status == "ok" and row.run_id == run_id else None


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.json"))
    if path.exists():
        return [path]
    raise UserError(f"There are no rows at {path}: no such file or folder. Name row files or a folder of them.")


def _load(path: Path) -> Row | None:
    try:
        row = Row(**json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse))
        if not (problem := row.problem()):
            return row
    except (OSError, ValueError, TypeError) as error:
        problem = str(error).removeprefix("Row.__init__() ")
    log.warning("skipped the damaged row file %s: %s", path, problem)
    return None


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number a row may hold")


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
