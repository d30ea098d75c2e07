"""Checkpoints: named tensors in files or in memory, read one by one."""

from merging.checkpoints.base import Change, Checkpoint, Flat, Known, Spec, StateDict, digest, identify_ahead, raw_bytes
from merging.checkpoints.safetensors_file import DTYPES, NAMES, SafetensorsFile

__all__ = [
    "DTYPES", "NAMES", "Change", "Checkpoint", "Flat", "Known", "SafetensorsFile", "Spec", "StateDict", "digest",
    "identify_ahead", "raw_bytes",
]  # fmt: skip
