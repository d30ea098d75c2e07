"""Options of frozen dataclasses: their types say what they may be, and they are checked when an object is made."""

import re
from typing import Annotated, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

from merging.errors import UserError
from merging.preflight import check_range


class Within(NamedTuple):
    """low <= value <= high, or low < value where `open_low`."""

    low: float
    high: float
    open_low: bool = False


Share = Annotated[float, Within(0.0, 1.0)]
Fraction = Annotated[float, Within(0.0, 1.0, open_low=True)]  # of which there is some
Rate = Annotated[float, Within(0.0, 1.0, open_low=True)]  # of learning
Count = Annotated[int, Within(1, 10**9)]
Index = Annotated[int, Within(0, 10**9)]
Coefficient = Annotated[float, Within(-100.0, 100.0)]


class Options:
    """Mixin of a frozen dataclass. prefix: what messages put in front of an option's name, as a command line has it.

    Its fields are checked by their types, `Literal` for one of several values and the ranges above; None is always
    right where the type has it. Raises UserError.
    """

    prefix: ClassVar[str]

    def __init_subclass__(cls, prefix: str | None = None) -> None:
        if prefix is not None or not hasattr(cls, "prefix"):
            cls.prefix = f"{snake_case(cls.__name__)}: " if prefix is None else prefix

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for kind in (hint, *get_args(hint)):  # of a union with None its members
                if get_origin(kind) is Literal and value not in get_args(kind):
                    choices = ", ".join(map(str, get_args(kind)))
                    raise UserError(f"{self.prefix}{name}={value!r} is unknown. Choose one of {choices}.")
                for limits in getattr(kind, "__metadata__", ()):
                    if value is not None:
                        check_range(f"{self.prefix}{name}", value, *limits[:2], open_low=limits.open_low)


def snake_case(name: str) -> str:
    """IsoCts as iso_cts."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
