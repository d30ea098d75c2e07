"""Benchmarks: `python -m launchers.bench forward|gpu|merge|factor|clip`."""
