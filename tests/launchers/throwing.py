"""A method that fails, for sweeps."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Throws:
    kinds: object = None  # those of the methods it stands among
    needs: ClassVar[str] = "nothing"

    def __call__(self, experts):
        raise ZeroDivisionError("nothing to merge by")
