"""Gates beside a merge whose tasks answer with parameters of their own, which no gate may see: they tell the task."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from merging.backbones.hugging_face import beside
from merging.errors import UserError
from merging.routing.gate_features import applied
from merging.routing.routed import Routed
from tasks.engine import Engine


def check_apart(sees: str) -> None:
    """Raises UserError for gates that would see what a true task's own parameters made of a sample."""
    if sees not in ("early", "pass"):
        raise UserError(
            f"With owned=heads+biases the true task's biases answer, and gates that decide inside the network ({sees}) "
            f"would see them, and so the task. Take a gate that decides before it, of one sample alone "
            f"(router.gate.sees=pass or early), or owned=heads."
        )


@torch.inference_mode()
def gate_of(model: Routed, inputs: Any, engine: Engine) -> Tensor:
    """The weights [B, G] of a model's one gate."""
    with engine.running():
        return applied(model.weights, beside(model, inputs) if isinstance(inputs, Mapping) else inputs)
