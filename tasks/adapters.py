"""Experts as low-rank adapters of a base (LoRA; Hu et al., 2022, arXiv 2106.09685), trained by the peft library."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from merging.checkpoints import Checkpoint, StateDict
from merging.checkpoints.lora import Lora, LoraConfig
from merging.errors import UserError
from merging.preflight import check_range

INNER = ".default."  # the name of an adapter, which peft puts into the names of its parameters and not into files


@dataclass(frozen=True)
class Adapter:
    """What is trained in place of whole weights: W_0 + alpha / r * B A, B [out, r] zero at first and A [r, in].

    targets: last names of the linear layers, or "all-linear", which leaves the output layer out. dropout: of what A
    reads while it is trained.
    """

    r: int = 8
    alpha: float = 16.0
    targets: Sequence[str] | str = "all-linear"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_range("recipe: adapter.r", self.r, 1, 10**5)
        check_range("recipe: adapter.alpha", self.alpha, 0.0, math.inf, open_low=True)
        check_range("recipe: adapter.dropout", self.dropout, 0.0, 1.0)
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))

    def config(self) -> dict[str, Any]:
        """As peft's adapter_config.json says it."""
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        return {"peft_type": "LORA", "r": self.r, "lora_alpha": self.alpha, "target_modules": targets,
                "lora_dropout": self.dropout, "bias": "none"}  # fmt: skip

    def put_into(self, tower: nn.Module) -> list[nn.Parameter]:
        """The factors, put into the layers of a tower, of which nothing else is trained then.

        Raises UserError where peft is not installed and for targets that the tower lacks.
        """
        try:
            from peft import LoraConfig as Settings
            from peft import inject_adapter_in_model
        except ImportError as error:
            raise UserError(
                "Adapters are trained by the package peft. Install it: pip install 'duet-merging[language]'."
            ) from error
        options = {name: value for name, value in self.config().items() if name != "peft_type"}
        try:
            inject_adapter_in_model(Settings(**options), tower)
        except ValueError as error:
            raise UserError(f"recipe: adapter.targets={self.targets} cannot be adapted: {error}") from error
        return [parameter for parameter in tower.parameters() if parameter.requires_grad]

    def opened(self, base: Checkpoint, trained: StateDict, full: Sequence[str] = ()) -> Checkpoint:
        """An expert in memory: the base with these factors. full: modules that were trained whole beside them."""
        return Lora(base, trained, LoraConfig(r=self.r, lora_alpha=self.alpha, modules_to_save=tuple(full)))


def in_files(name: str) -> str:
    """A parameter's name as files have it."""
    return name.replace(INNER, ".")
