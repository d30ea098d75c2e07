"""What a merge or a fit may use beside the experts' weights, and the record of what it really opened."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from merging.cache import Cache
from merging.calibration import Calibration
from merging.checkpoints import Checkpoint
from merging.errors import UserError
from merging.needs import LABELS, NEEDS

Log = Callable[[Mapping[str, float], int], object]
ORDER = ("test", "val", "calibration", "train")  # the first opened one is what a row says it adapted to
CPU = torch.device("cpu")


def silent(values: Mapping[str, float], step: int) -> None:
    """A log that keeps nothing."""


class Data(Protocol):
    """The tasks' side of a context; all tensors lie on one device."""

    def unlabelled(self, split: str) -> Calibration: ...
    def labels(self, split: str) -> Sequence[Tensor]: ...
    def validate(self, merged: Any) -> Mapping[str, Any]: ...
    def multitask(self) -> Checkpoint: ...


@dataclass(frozen=True)
class Opened:
    """Which splits were looked at, and by whom: {split: [names]}, in the order of first openings."""

    splits: dict[str, list[str]] = field(default_factory=dict)

    def note(self, who: str, split: str) -> None:
        """`who` looked at a split, or uses what was computed from it earlier."""
        names = self.splits.setdefault(split, [])
        if who not in names:
            names.append(who)

    def by(self, who: str) -> tuple[str, ...]:
        """The splits that `who` opened."""
        return tuple(split for split, names in self.splits.items() if {who, who + LABELS} & set(names))


@dataclass(frozen=True)
class Context:
    """Device, seed, log and the tasks' data for methods and fits. The default has no data: enough for most methods.

    who: the name under which openings are recorded. needs, splits: what `who` declared; opening anything else is a
    UserError. None does not check.
    """

    data: Data | None = None
    device: torch.device = CPU
    seed: int = 0
    log: Log = silent
    unfinished: Cache | None = None  # for states of this piece of work alone, so that it goes on after a kill
    opened: Opened = field(default_factory=Opened)
    who: str = "the method"
    needs: str | None = None
    splits: tuple[str, ...] = ()

    def acting(self, who: str, method: object = None) -> "Context":
        """The same context for `who`, held to what `method` declares where one is given."""
        if method is None:
            return replace(self, who=who, needs=None, splits=())
        return replace(self, who=who, needs=needs_of(method), splits=splits_of(method))

    def unlabelled(self, split: str = "calibration") -> Calibration:
        """The inputs of a split, without labels. Raises UserError where there are none, or they were not declared."""
        return self._open(f"unlabelled {split} inputs of every task", "inputs", split).unlabelled(split)

    def labelled(self, split: str = "calibration") -> tuple[Calibration, Sequence[Tensor]]:
        """The inputs of a split and their labels [n] per task. Raises UserError as `unlabelled`, and for test."""
        if split == "test":
            raise UserError(
                f"{self.who} would learn from the labels that are scored. Choose calibration, val or train."
            )
        if self.data is not None and not hasattr(self.data, "labels"):
            raise UserError(f"{self.who} uses labelled {split} inputs of every task, and there are no labels here.")
        data = self._open(f"labelled {split} inputs of every task", "labels", split)
        return data.unlabelled(split), data.labels(split)

    def validate(self, merged: Any) -> Mapping[str, Any]:
        """{task: Score} on validation, which needs labels. Raises UserError as `unlabelled`."""
        return self.validation()(merged)

    def validation(self) -> Callable[[Any], Mapping[str, Any]]:
        """What `validate` scores merges with, for who scores many. Raises UserError as `unlabelled`."""
        if self.data is not None and not hasattr(self.data, "validate"):
            raise UserError(f"{self.who} uses validation scores, and these data have none: labels are needed for them.")
        return self._open("validation scores", "labels", "val").validate

    def multitask(self) -> Checkpoint:
        """The model trained on the labelled data of all tasks. Raises UserError where there is none."""
        what = "a model trained on the data of all tasks"
        return replace(self, needs=None)._open(what, "labels", "train").multitask()

    def _open(self, what: str, need: str, split: str) -> Data:
        """The data, and a record that a split was opened. Raises UserError for what is not there or not declared."""
        if self.data is None:
            raise UserError(
                f"{self.who} uses {what}, and there are none here. Give a context with data, or choose a method that "
                f"needs nothing."
            )
        self._check(need, split)
        self.opened.note(self.who + (LABELS if need == "labels" else ""), split)
        return self.data

    def _check(self, need: str, split: str) -> None:
        """Raises UserError for what was not declared."""
        if self.needs is None or (NEEDS.index(self.needs) >= NEEDS.index(need) and split in self.splits):
            return
        only = f"only of {', '.join(self.splits)}" if self.splits else "that it needs nothing besides weights"
        raise UserError(
            f"{self.who} opens the {'' if need == 'labels' else 'un'}labelled {split} inputs, but says {only}. Let its "
            f'class say what it uses: needs: ClassVar[str] = "{need}" for calibration; for others '
            f'splits: ClassVar = ("{split}",), too.'
        )


ALONE = Context()


def adaptation(opened: Mapping[str, Sequence[str]], selection: Collection[str] = ()) -> str:
    """The split that numbers adapted to, of several the gravest: "test"; "none". `selection`: who only chose by it."""
    seen = [split for split, who in opened.items() if set(who) - set(selection)]
    return next((split for split in (*ORDER, *seen) if split in seen), "none")


def splits_of(method: object) -> tuple[str, ...]:
    """The splits that a method and those inside it may open: `splits`, or calibration where it needs any data."""
    parts = [*nested(method)]
    opened = (getattr(part, "splits", () if needs_of(part) == "nothing" else ("calibration",)) for part in parts)
    return tuple(dict.fromkeys(split for splits in opened for split in splits))


def needs_of(method: object) -> str:
    """What a method and those inside it ask for besides weights: nothing | inputs | labels, the most of all."""
    return max((getattr(part, "needs", "nothing") for part in nested(method)), key=NEEDS.index)


def nested(method: Any) -> Iterator[Any]:
    """A method and those inside it."""
    yield method
    for option in fields(method) if is_dataclass(method) else ():
        if hasattr(inner := getattr(method, option.name), "needs"):
            yield from nested(inner)
