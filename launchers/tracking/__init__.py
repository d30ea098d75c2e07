"""Live tracking of runs with Weights & Biases."""
