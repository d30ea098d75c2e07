"""Fixtures of the tests of merging/."""

import itertools

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def two_threads():
    """Lets torch use two threads, whatever the machine or the environment says."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def stored(tmp_path):
    """Writes a state dict as a safetensors file with the reference library and returns its path."""
    numbers = itertools.count()

    def store(tensors, metadata=None):
        path = tmp_path / f"stored{next(numbers)}.safetensors"
        save_file(tensors, path, metadata)
        return path

    return store
