"""Fixtures of all tests."""

import pytest

from merging import Cache


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def unwritable(tmp_path):
    """A folder in which nothing can be made, not even by root: a file stands in its way."""
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "folder"
