"""The real benchmark: published data sets, zero-shot heads and expert families."""
