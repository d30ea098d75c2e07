"""Fixtures of all tests."""

import contextlib
import sys

import pytest
import torch

from merging import Cache

with contextlib.suppress(ImportError):  # rouge-score brings absl: its handler closes its stream when logging is set up
    from absl import logging as absl_logging

    absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__  # and not pytest's capture of it


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
