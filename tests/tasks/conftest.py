"""Fixtures of the tests of tasks/."""

import pytest
from hub import Hub
from served import publish_bases


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A loopback hub with the published bases, at which this process's client is pointed."""
    with Hub(tmp_path / "served") as served:
        served.here(monkeypatch, tmp_path / "hf")
        publish_bases(served)
        yield served
