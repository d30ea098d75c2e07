"""Checkpoints: named tensors in files or in memory, read one by one."""

from merging.checkpoints.base import (
    Adapted,
    Change,
    Checkpoint,
    Identified,
    Known,
    Spec,
    StateDict,
    digest,
    identify_ahead,
    raw_bytes,
)  # fmt: skip
from merging.checkpoints.safetensors_file import DTYPES, NAMES, SafetensorsFile

__all__ = [
    "DTYPES", "NAMES", "Adapted", "Change", "Checkpoint", "Identified", "Known", "SafetensorsFile", "Spec",
    "StateDict", "digest", "identify_ahead", "raw_bytes",
]  # fmt: skip
