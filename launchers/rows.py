"""Rows: what one cell of the grid (one method on one suite) leaves behind, a strict JSON file each.

The annotations of `Row` are the schema of the files: pydantic compares on reading and on writing. It is loaded when the
first row is, not before.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen
from typing_extensions import TypedDict

from merging.errors import UserError
from merging.files import write_atomically
from merging.identity import identity
from tasks.score import Score

if TYPE_CHECKING:
    from pydantic import TypeAdapter

log = logging.getLogger(__name__)
VERSION = 2  # of the files
SURROGATE = re.compile(r"[\ud800-\udfff]")  # of a file name that is no UTF-8
Whole = Annotated[int, Gt(-(1 << 63)), Lt(1 << 63)]
Fraction = Annotated[float, Ge(0), Le(1)]
Cosine = Annotated[float, Ge(-1), Le(1)]


class Routing(TypedDict, total=False):
    """What gates did: mean weights of true task x expert, routing accuracy per task, mean weights of held-out tasks."""

    matrix: list[list[float]]
    accuracy: dict[str, Fraction]
    unseen: dict[str, list[float]]


class Searched(TypedDict, total=False):
    """How a scale was searched: by which criterion, the scales listed, and how many of them were scored."""

    criterion: str
    scales: Annotated[list[float], MinLen(1)]
    scored: Whole


class _Scored(TypedDict):
    scores: dict[str, float]  # on validation, task -> measured or predicted, higher is better


class Point(_Scored, total=False):
    """One of the front that a method found. storage: the share of all experts' modules that it keeps."""

    storage: Fraction


@dataclass(frozen=True)
class Row:
    """One method on one suite, with everything needed to trust, repeat or compare the numbers."""

    __pydantic_config__: ClassVar = {"strict": True, "extra": "forbid", "allow_inf_nan": False}

    run_id: str  # 12 hex digits of the identity of its cell
    status: Literal["ok", "error"]
    method: str  # label in tables: "ties", "base", "expert", ...
    config: dict[str, Any]  # the resolved Hydra config
    suite: str
    tasks: list[str]
    needs: str  # what the method asks for besides weights: "nothing" | "inputs" | "labels"
    family: str  # where base and experts come from
    owned: str = field(default="heads", kw_only=True)  # what the true task's expert answers with, see merging.owned
    checkpoints: dict[str, str]  # "base" and every task -> content id
    splits: dict[str, dict[str, Any]]  # task -> {"name": "test", "id": fingerprint, "size": images}
    seed: Whole
    code: str  # git commit or version
    macs: Whole  # multiply-accumulates per sample
    created: str  # ISO time, UTC
    scores: dict[str, Score] = field(default_factory=dict)  # task -> score on the split that `splits` names
    validation: dict[str, float] | None = None  # task -> value on validation at the chosen scale, after a search
    scale: float | None = None
    scale_source: str = "-"  # "fixed" | "search:val" | "-"
    router: str = "none"  # "oracle" | ...
    granularity: str = "none"  # "sample" | ...
    stored_bytes: Whole = 0  # everything that must be stored to use the merged model, the base included
    seconds: dict[str, float] = field(default_factory=dict)  # "merge", "search", "router", "score"
    error: str | None = None
    adaptation: str = "none"  # the split whose unlabelled images the method or its router saw; "test" is transductive
    opened: dict[str, list[str]] = field(default_factory=dict)  # split -> who looked at it before the score
    params: Whole = 0  # numbers stored for what is mixed and for the gates
    routing: Routing = field(default_factory=Routing)  # empty without gates
    energy: dict[str, list[float]] = field(default_factory=dict)  # parameter -> share of each task vector's energy
    collapsed: list[str] = field(default_factory=list)  # tasks that the collapse guard suspects
    remarks: list[str] = field(default_factory=list)  # what a table with these experts must say
    search: Searched = field(default_factory=Searched)  # empty where no scale was searched
    front: list[Point] = field(default_factory=list)  # that the method searched; empty where it did not
    contents: dict[str, dict[str, str]] = field(default_factory=dict)  # task -> "head" or split that is read -> id
    similarity: list[list[Cosine]] = field(default_factory=list)  # of an expert row: between the task vectors
    unseen: dict[str, Score | None] = field(default_factory=dict)  # held-out task -> score; None: no expert for it
    probe: dict[str, Score] = field(default_factory=dict)  # task -> score under a probe of the merge, if asked for
    overrides: list[str] | None = None  # of `duet`, that lead to this row; None in rows from before they were kept
    version: Literal[2] = VERSION

    @property
    def accuracy(self) -> dict[str, float]:
        """Task -> value of its score."""
        return {task: score.value for task, score in self.scores.items()}


def value(score: Score | None) -> float | None:
    """The value of a score, where there is one."""
    return None if score is None else score.value


def write(row: Row, folder: str | Path) -> Path:
    """Write `<folder>/<run_id>.json` atomically and return its path. Raises UserError (NaN, disk, bad row)."""
    from pydantic import ValidationError

    path = Path(folder) / f"{row.run_id}.json"
    content = json.dumps(asdict(row) | {"config": identity(row.config)}, ensure_ascii=False, indent=1)
    content = SURROGATE.sub(lambda match: rf"\\u{ord(match[0]):x}", content)
    try:
        _schema().validate_json(content)
    except ValidationError as error:
        raise UserError(
            f"The row {row.method} on {row.suite} ({path}) was not written: {first_problem(error)}."
        ) from error
    return write_atomically(path, lambda file: file.write(f"{content}\n".encode()))


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
    from pydantic_core import from_json

    try:
        content = from_json(path.read_bytes(), allow_inf_nan=False)
        return _schema().validate_json(json.dumps(_upgraded(content)))
    except OSError as error:
        log.log(level, "skipped the row file %s: %s", path, error.strerror or error)
    except (ValueError, TypeError, AttributeError, UserError) as error:  # no JSON, nothing like a row, or a bad one
        log.log(level, "skipped the damaged row file %s: %s", path, first_problem(error))
    return None


def _upgraded(row: Any) -> Any:
    """The content of a row file in today's version. Version 1 had no number, and shares of images for scores."""
    if not isinstance(row, dict) or "version" in row or not isinstance(row.get("accuracy"), dict):
        return row
    shares, splits, unseen = row["accuracy"], row.get("splits", {}), row.get("unseen", {})
    kept = {name: value for name, value in row.items() if name != "accuracy"}
    return kept | {"version": VERSION, "scores": _scored(shares, splits), "unseen": _scored(unseen, splits)}


def _scored(shares: dict[str, Any], splits: dict[str, Any]) -> dict[str, Any]:
    """Shares of correct images as scores, in JSON."""
    scores: dict[str, Any] = dict.fromkeys(shares)
    for task, share in shares.items():
        if share is not None:
            count = splits.get(task, {}).get("size", 0)
            error = math.sqrt(share * (1 - share) / max(1, count))
            scores[task] = {"metric": "accuracy", "value": share, "count": count, "standard_error": error}
    return scores


@cache
def _schema() -> "TypeAdapter[Row]":
    from pydantic import AfterValidator, TypeAdapter

    return TypeAdapter(Annotated[Row, AfterValidator(_checked)])


def first_problem(error: Exception) -> str:
    """The first thing that is wrong, and where: of pydantic's list, else the whole message."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    where, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason


def _checked(row: Row) -> Row:
    """The row. Raises ValueError where its parts contradict each other."""
    tasks, routing = row.tasks, row.routing
    missing = [task for task in tasks if task not in row.scores]
    scores = {**row.scores, **{task: score for task, score in row.unseen.items() if score is not None}}
    odd = [task for task, score in scores.items() if score.metric == "accuracy" and not 0 <= score.value <= 1]
    both = [task for task in row.unseen if task in tasks]
    lacking = sorted(Searched.__annotations__.keys() - row.search.keys()) if row.search else []
    rules = {
        "no score for any task": bool(tasks),
        f"no score for {', '.join(missing)}": not missing,
        f"accuracy outside 0..1 for {', '.join(odd)}": not odd,
        f"{', '.join(both)} both merged and unseen": not both,
        "similarity is not tasks x tasks": not row.similarity or _is_square(row.similarity, tasks),
        f"search lacks {', '.join(lacking)}": not lacking,
        "routing.matrix is not tasks x tasks": not routing or _is_square(routing.get("matrix", []), tasks),
        "routing.accuracy is not one number a task": not routing or {*routing.get("accuracy", ())} == {*tasks},
        "routing.unseen is not one weight a task": {*map(len, routing.get("unseen", {}).values())} <= {len(tasks)},
    }
    if row.status == "error":
        rules = {"a failed row without its error": bool(row.error)}
    for problem, holds in rules.items():
        if not holds:
            raise ValueError(problem)
    return row


def _is_square(matrix: Sequence[Sequence[float]], tasks: Sequence[str]) -> bool:
    return [len(line) for line in matrix] == [len(tasks)] * len(tasks)
