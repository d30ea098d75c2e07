"""Benchmarks: `python -m launchers.bench forward|gpu|merge|llm|factor|clip`."""

import os
from pathlib import Path

import yaml

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which counts memory, would log its every step
DECLARED = yaml.safe_load(Path(__file__).with_name("benchmarks.yaml").read_text())
SIZES, MODELS, BENCHMARKS, TABLES = (DECLARED[name] for name in ("sizes", "models", "benchmarks", "tables"))
TASKS = 8
