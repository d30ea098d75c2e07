"""Benchmarks: `python -m launchers.bench forward|merge|factor|clip`."""
