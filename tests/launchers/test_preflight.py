"""What is said of a large model before anything of it is read."""

import logging

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from launchers import preflight
from launchers.preflight import fits
from merging.errors import UserError
from tasks.engine import Engine

pytest.importorskip("transformers")


def backbone(name):
    with initialize_config_module("conf", version_base="1.3"):
        return instantiate(compose("config", [f"backbone={name}"]).backbone, _convert_="all")


def test_gigabytes_are_those_of_the_module_and_of_the_merged_weights(monkeypatch, caplog):
    monkeypatch.setattr(preflight, "available", lambda where, device: 100e9)
    with caplog.at_level(logging.INFO):
        assert fits(backbone("qwen_1_5_14b"), Engine("cpu")) == 14_167_290_880
    assert "14.17 billion parameters and needs 85.0 of 100.0 GB free (cpu)" in caplog.text  # two and four bytes each
    with pytest.raises(UserError, match=r"72b does not fit into memory: it needs 433.7 of 100.0 GB.*suite=none"):
        fits(backbone("qwen_1_5_72b"), Engine("cpu"))


def test_of_a_small_model_nothing_is_said(monkeypatch, caplog):
    monkeypatch.setattr(preflight, "available", lambda where, device: 0)
    with caplog.at_level(logging.INFO):
        assert fits(backbone("roberta_base"), Engine("cpu")) > 10**8
    assert not caplog.text


def test_this_machine_says_how_much_is_free():
    assert preflight.available("cpu", Engine("cpu").torch_device) > 10**6
