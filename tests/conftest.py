"""Fixtures of all tests."""

import pytest
import torch

from merging import Cache


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def unwritable(tmp_path):
    """A folder in which nothing can be made, not even by root: a file stands in its way."""
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "folder"


@pytest.fixture
def one_thread():
    """torch on a single thread, as in the workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
