"""Coefficients of their own for kinds of parameters, and along the depth of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from merging.backbones.base import FAMILIES, KINDS, ParamInfo
from merging.combined import Changes, chosen
from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged
from merging.options import Options
from merging.preflight import check_range

GROUPS = ("norm", "ffn", "attention", "other", "all")
LIMIT = 100.0


@dataclass(frozen=True)
class ByKind(Options, prefix=""):
    """Mixin of the methods that add one change to the base, which may be weighed by kind and depth.

    kinds: coefficients of their own for kinds of parameters or their families (ffn, attention), which a search for the
    scale leaves alone. That of the kind wins over that of its family; `other` is for all that are not ffn, attention or
    norm, and `all` for what no other names. A list is spread evenly from the first to the last block and interpolated
    linearly between; what lies in front of the blocks has its first number, what lies behind them its last. None is the
    method's own coefficient, 0 keeps what the base has.
    """

    kinds: Mapping[str, float | Sequence[float] | None] = field(
        default_factory=lambda: dict.fromkeys(GROUPS), kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.kinds, Mapping):
            raise UserError(f"{self.prefix}kinds={self.kinds!r} is no mapping. Write kinds={{'norm': 0.0}}.")
        for kind, values in self.kinds.items():
            if kind not in (known := (*FAMILIES, *KINDS, "all")):
                raise UserError(f"{self.prefix}kinds has {kind!r}. Kinds are {', '.join(known)}.")
            if values is not None and not (values := _listed(values)):
                raise UserError(f"{self.prefix}kinds.{kind} is an empty list. Give one number or several over depth.")
            for value in values or ():
                check_range(f"{self.prefix}kinds.{kind}", value, -LIMIT, LIMIT)

    def weighed(self, experts: Experts, changes: Changes, scale: float | None = None) -> Merged:
        """The base plus `changes` times `scale`, or times what `kinds` has for them.

        Raises UserError where kinds are named and no table tells those of these checkpoints.
        """
        if all(values is None for values in self.kinds.values()):  # the names say nothing
            return experts.merged(changes, scale)
        where = positions(experts)
        scales = {key: self._coefficient(experts.param(key), where[key]) for key in changes}
        shared = chosen(changes, {key: 1.0 for key, value in scales.items() if value is None})
        fixed = chosen(changes, {key: value for key, value in scales.items() if value is not None})
        return experts.merged(shared, scale, fixed=fixed)

    def _coefficient(self, info: ParamInfo, position: float) -> float | None:
        rest = info.family if info.family in GROUPS else "other"
        named = (self.kinds.get(name) for name in (info.kind, info.family, rest, "all"))
        values = next((values for values in named if values is not None), None)
        return None if values is None else interpolated(_listed(values), position)


def _listed(values: float | Sequence[float]) -> Sequence[float]:
    return values if isinstance(values, Sequence) else (values,)


def interpolated(values: Sequence[float], position: float) -> float:
    """The values, spread evenly over [0, 1], at a position."""
    return float(np.interp(position, np.linspace(0, 1, len(values)), values))


def positions(experts: Experts, behind: float = 1.0) -> dict[str, float]:
    """Where every parameter lies in its stack of blocks: 0 in the first and in front, 1 in the last, `behind` after."""
    infos = {key: experts.param(key) for key in replace(experts, only=None).specs()}
    last: dict[str, int] = {}
    for info in infos.values():
        if info.block is not None and info.depth is not None:
            stack = info.block.rpartition(".")[0]
            last[stack] = max(last.get(stack, 0), info.depth)
    return {key: _position(info, last, behind) for key, info in infos.items()}


def _position(info: ParamInfo, last: Mapping[str, int], behind: float) -> float:
    if info.block is None or info.depth is None:
        return behind * info.after
    return info.depth / max(1, last[info.block.rpartition(".")[0]])
