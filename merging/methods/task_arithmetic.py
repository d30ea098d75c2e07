from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from merging.backbones.base import FAMILIES, KINDS, ParamInfo
from merging.combined import chosen
from merging.entries import combined
from merging.errors import UserError
from merging.experts import Experts
from merging.merged import Merged
from merging.preflight import check_range

GROUPS = ("norm", "ffn", "attention", "other")


@dataclass(frozen=True)
class TaskArithmetic:
    """Task Arithmetic: the base plus a multiple of the summed task vectors. Ilharco et al., 2023, arXiv 2212.04089.

    scale: 0 is the base, 1/T is plain averaging, 1 adds every task vector in full; 0.3 is published for eight tasks.
    kinds: coefficients of their own for kinds of parameters or their families (ffn, attention), which a search for the
    scale leaves alone: that of the kind wins over that of its family, and `other` is for all that are not ffn,
    attention or norm. None is `scale`, 0 keeps what the base has.
    """

    scale: float = 0.3
    kinds: Mapping[str, float | None] = field(default_factory=lambda: dict.fromkeys(GROUPS))
    needs: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        if not isinstance(self.kinds, Mapping):
            raise UserError(f"task_arithmetic: kinds={self.kinds!r} is no mapping. Write kinds={{'norm': 0.0}}.")
        for kind, scale in self.kinds.items():
            if kind not in (*FAMILIES, *KINDS):
                raise UserError(f"task_arithmetic: kinds has {kind!r}. Kinds are {', '.join((*FAMILIES, *KINDS))}.")
            if scale is not None:
                check_range(f"task_arithmetic: kinds.{kind}", scale, -100.0, 100.0)

    def __call__(self, experts: Experts) -> Merged:
        total = combined(experts, lambda tau: tau.sum(0), 1.0)
        if all(scale is None for scale in self.kinds.values()):  # the names say nothing
            return experts.merged(total, self.scale)
        scales = {key: self._coefficient(experts.param(key)) for key in total}
        shared = chosen(total, {key: 1.0 for key, scale in scales.items() if scale is None})
        fixed = chosen(total, {key: scale for key, scale in scales.items() if scale is not None})
        return experts.merged(shared, self.scale, fixed=fixed)

    def _coefficient(self, info: ParamInfo) -> float | None:
        rest = info.family if info.family in GROUPS else "other"
        named = (self.kinds.get(name) for name in (info.kind, info.family, rest))
        return next((scale for scale in named if scale is not None), None)
