"""Checkpoints: named tensors in files or in memory, read one by one."""

from merging.checkpoints.base import (
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
    "DTYPES", "NAMES", "Checkpoint", "Identified", "Known", "SafetensorsFile", "Spec", "StateDict", "digest",
    "identify_ahead", "raw_bytes",
]  # fmt: skip
