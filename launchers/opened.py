"""Which splits a merge and its gates really looked at, and who did. Scoring is not counted: `Row.splits` tells it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from merging.adapt import Learned
from merging.calibration import Calibration
from merging.checkpoints import Checkpoint
from merging.errors import UserError
from merging.experts import Experts
from merging.methods.method import Method
from tasks.scales import Search

SCALE = "scale"  # who picks a coefficient by labelled accuracy: selection, not adaptation
ORDER = ("test", "val", "calibration", "train")  # of the splits that a row adapted on the first is its `adaptation`


@dataclass(frozen=True)
class Opened:
    """Notes every opening of a cell; `splits` is what the row keeps, split -> who, in the order of first openings."""

    splits: dict[str, list[str]] = field(default_factory=dict)

    def note(self, who: str, split: str) -> None:
        """`who` looked at a split, or uses what was computed from it earlier."""
        names = self.splits.setdefault(split, [])
        if who not in names:
            names.append(who)

    def watched(self, experts: Experts, who: str, declared: Collection[str] | None = None) -> Experts:
        """The same experts, noting the splits that `who` opens; a UserError for one not among those it `declared`.

        What a cache holds of a split's images is keyed by them, so its use opens the split too, without reading one.
        """
        give, train = experts.calibration, experts.multitask

        def opening(split: str) -> Calibration:
            if declared is not None and split not in declared:
                says = f"only of {', '.join(declared)}" if declared else "that it needs nothing besides weights"
                raise UserError(
                    f"{who} opens the unlabelled {split} images, but says {says}. Let its class say what it uses: "
                    f'needs: ClassVar[str] = "inputs" for calibration; for others splits: ClassVar = ("{split}",), too.'
                )
            self.note(who, split)
            assert give is not None
            return give(split)

        def training() -> Checkpoint:
            self.note(who, "train")
            assert train is not None
            return train()

        return replace(experts, calibration=give and opening, multitask=train and training)

    def by(self, who: str) -> tuple[str, ...]:
        """The splits that `who` opened."""
        return tuple(split for split, names in self.splits.items() if who in names)


def adaptation(opened: Mapping[str, Sequence[str]]) -> str:
    """The split that the numbers of a row adapted to: where there are several the gravest, "test"; "none"."""
    seen = [split for split, who in opened.items() if set(who) - {SCALE}]
    return next((split for split in (*ORDER, *seen) if split in seen), "none")


def splits_read(method: Method, scale: object, router: object, config: Mapping[str, Any]) -> list[str]:
    """What a cell reads beside the split that it scores, known before: it searches on some, or learns from some."""
    searched = [scale.split] if isinstance(scale, Search) and config["scale"] is not None else []
    learned = [router.split] if isinstance(router, Learned) and config["router"] is not None else []
    return [*dict.fromkeys([*searched, *learned, *splits_of(method)])]


def splits_of(method: Method) -> tuple[str, ...]:
    """The splits whose unlabelled images a method and those inside it may open: `splits`, or calibration for "inputs".

    What learned from labels is a checkpoint.
    """
    calibration = {"inputs": ("calibration",)}
    opened = (getattr(each, "splits", calibration.get(each.needs, ())) for each in with_inner(method))
    return tuple(dict.fromkeys(split for splits in opened for split in splits))


def needs_of(method: Method) -> str:
    """What a method and those inside it ask for besides weights: nothing | inputs | labels, the most of all."""
    asked = {each.needs for each in with_inner(method)}
    return next(need for need in ("labels", "inputs", "nothing") if need in asked)


def with_inner(method: Method) -> Iterator[Method]:
    """A method and those inside it."""
    yield method
    for knob in fields(method) if is_dataclass(method) else ():
        if hasattr(inner := getattr(method, knob.name), "needs"):
            yield from with_inner(inner)
