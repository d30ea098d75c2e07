"""What makes a row unusable, and in which field."""

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """What is wrong, and the keys that lead to the first wrong value; none where the row lacks something."""

    said: str
    where: tuple[str, ...] = ()


KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("run_id", "method", "suite", "scale_source", "needs", "router", "granularity"), str),
    **dict.fromkeys(("family", "code", "created", "adaptation"), str),
    **dict.fromkeys(("config", "accuracy", "checkpoints", "splits", "seconds", "routing", "energy"), dict),
    **dict.fromkeys(("opened", "unseen", "search", "contents"), dict),
    **dict.fromkeys(("seed", "stored_bytes", "macs", "params"), int),
    **dict.fromkeys(("tasks", "collapsed", "remarks", "similarity"), list),
    "validation": (dict, type(None)),
    "scale": (float, int, type(None)),
    "error": (str, type(None)),
}
INSIDE = {
    "checkpoints": str, "splits": dict, "contents": dict, "tasks": str, "collapsed": str, "remarks": str,
    "opened": list,
}  # fmt: skip


def problem(row: Any) -> Problem | None:
    """The first thing wrong with a row, or None."""
    if row.status not in ("ok", "error"):
        return Problem(f"status is {row.status!r}, not 'ok' or 'error'", ("status",))
    if found := next(_types(row), None):
        return found
    if row.status == "error":
        return None if row.error else Problem("a failed row without its error", ("error",))
    routing = _routing(row) if row.routing else ()
    return next(chain(_scores(row), routing, _energy(row), _similarity(row), _search(row)), None)


def _types(row: Any) -> Iterator[Problem]:
    values = {name: getattr(row, name) for name in KINDS}
    wrong = [name for name, kind in KINDS.items() if not isinstance(values[name], kind) or _is_odd(values[name])]
    if wrong:
        yield Problem(f"wrong type in {', '.join(wrong)}", (wrong[0],))
        return
    for name, kind in INSIDE.items():
        inner = values[name].items() if isinstance(values[name], dict) else [(None, each) for each in values[name]]
        for key, value in inner:
            if not isinstance(value, kind):
                yield Problem(f"wrong type in {name}: {value!r}", (name, key) if key else (name,))
    for split, who in row.opened.items():
        if not all(isinstance(name, str) for name in who):
            yield Problem(f"wrong type in opened: {who!r}", ("opened", split))
    for phase, seconds in row.seconds.items():
        if not is_number(seconds):
            yield Problem(f"seconds of {phase} are {seconds!r}, no number", ("seconds", phase))


def _scores(row: Any) -> Iterator[Problem]:
    missing = [task for task in row.tasks if task not in row.accuracy]
    if missing or not row.tasks:
        yield Problem(f"no accuracy for {', '.join(missing) or 'any task'}", ("accuracy",) if row.tasks else ("tasks",))
    for name, scores in (("accuracy", row.accuracy), ("validation", row.validation or {})):
        if odd := [task for task, score in scores.items() if not _is_fraction(score)]:
            yield Problem(f"{name} outside 0..1 for {', '.join(odd)}", (name, odd[0]))
    if odd := [task for task, score in row.unseen.items() if not (score is None or _is_fraction(score))]:
        yield Problem(f"unseen outside 0..1 for {', '.join(odd)}", ("unseen", odd[0]))
    if both := [task for task in row.unseen if task in row.tasks]:
        yield Problem(f"{', '.join(both)} both merged and unseen", ("unseen", both[0]))


def _routing(row: Any) -> Iterator[Problem]:
    """What is wrong with what the gates left behind."""
    matrix, right, count = row.routing.get("matrix"), row.routing.get("accuracy"), len(row.tasks)
    lines = matrix if isinstance(matrix, list) else []
    if not _is_square(matrix, count):
        yield Problem(f"the routing matrix is not {count} x {count}", ("routing", "matrix"))
    elif not all(map(_are_numbers, lines)):
        yield Problem("the routing matrix holds a weight that is no finite number", ("routing", "matrix"))
    elif not isinstance(right, dict) or set(right) != set(row.tasks):
        yield Problem("the routing accuracy is not one number a task", ("routing", "accuracy"))
    elif odd := [task for task, share in right.items() if not _is_fraction(share)]:
        yield Problem(f"routing accuracy outside 0..1 for {', '.join(odd)}", ("routing", "accuracy", odd[0]))
    elif odd := [task for task, weights in row.routing.get("unseen", {}).items()
                 if not _are_numbers(weights) or len(weights) != count]:  # fmt: skip
        yield Problem(f"the weights for {', '.join(odd)} are not {count} numbers", ("routing", "unseen", odd[0]))


def _energy(row: Any) -> Iterator[Problem]:
    if odd := [key for key, shares in row.energy.items() if not _are_numbers(shares)]:
        yield Problem(f"energy that is no finite number for {', '.join(odd)}", ("energy", odd[0]))


def _similarity(row: Any) -> Iterator[Problem]:
    square, count = row.similarity, len(row.tasks)
    if square and not _is_square(square, count):
        yield Problem(f"the similarity is not {count} x {count}", ("similarity",))
    elif not all(is_number(cosine) and -1 <= cosine <= 1 for line in square for cosine in line):
        yield Problem("the similarity holds a cosine outside -1..1", ("similarity",))


def _search(row: Any) -> Iterator[Problem]:
    search = row.search
    if search and not (
        isinstance(search.get("criterion"), str) and search.get("scales") and _are_numbers(search["scales"])
        and isinstance(search.get("scored"), int)
    ):  # fmt: skip
        yield Problem("the search of the scale lacks its criterion, the scales or how many were scored", ("search",))


def _is_square(matrix: Any, count: int) -> bool:
    lines = matrix if isinstance(matrix, list) else []
    return [len(line) if isinstance(line, list) else -1 for line in lines] == [count] * count


def is_number(value: Any) -> bool:
    """A finite number of 64 bits; True and False are none."""
    return isinstance(value, (float, int)) and not _is_odd(value)


def _is_odd(value: Any) -> bool:
    """What Python or JSON lets pass for a number and no table can print."""
    if isinstance(value, float):
        return not math.isfinite(value)  # 1e999
    return isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 1 << 63)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(map(is_number, values))


def _is_fraction(score: Any) -> bool:
    return is_number(score) and 0 <= score <= 1
