"""Engines change the speed of a score, not the images it is about."""

import pytest
import small
import torch

from merging import Experts, UserError
from merging.methods import Base, TaskArithmetic
from tasks.engine import Engine
from tasks.evaluate import Grid


@pytest.mark.parametrize("batch", [1, 4, 7, 100])
@pytest.mark.parametrize("start", [0, 3, 7])
def test_every_image_comes_once_and_in_order(batch, start):
    images = torch.arange(7 * 3).view(7, 3)
    found = list(Engine("cpu", batch=batch).stream(images, start))
    assert torch.equal(torch.cat([images[:0], *found]), images[start:])
    assert all(len(each) <= batch for each in found)


def test_bf16_rounds_and_compiled_towers_do_not(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no processes that import torch, too
    suite, experts = small.suite("hues", "tints"), Experts.open(small.tower_state(), [small.tower_state(1)] * 2)
    tower = small.TOWER.build().eval()
    images = small.TOWER.prepare(suite.tasks[0].split("test").inputs)
    with torch.inference_mode(), Engine("cpu", "bf16").running():
        rounded = tower(images)
    with torch.inference_mode(), Engine("cpu").running():
        plain = tower(images)
    assert rounded.dtype == torch.bfloat16 and plain.dtype == torch.float32
    assert 0 < (rounded.float() - plain).abs().max() < 0.05 * plain.abs().max()

    for method in (Base(), TaskArithmetic()):
        merged = method(experts)
        eager = Grid(suite, small.TOWER, Engine("cpu")).score(merged, "test")
        assert Grid(suite, small.TOWER, Engine("cpu", batch=5)).score(merged, "test") == eager
    assert Grid(suite, small.TOWER, Engine("cpu", compile=True)).score(merged, "test") == eager


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"device": "gpu"}, r"engine.device='gpu' cannot be used. Choose auto, cpu, cuda or cuda:1"),
        ({"device": "mps"}, r"engine.device='mps' cannot be used. Choose auto, cpu, cuda or cuda:1"),
        ({"precision": "fp16"}, r"engine.precision='fp16' is unknown. Choose one of auto, fp32, bf16"),
        ({"batch": 0}, r"engine.batch=0 is out of range"),
        ({"device": "cuda:99"}, r"engine.device=cuda:99 is not there: torch sees \d+ GPUs. Set engine.device=cpu"),
    ],
)
def test_what_is_not_there_is_named(knobs, message):
    with pytest.raises(UserError, match=message):
        Engine(**knobs)


def test_auto_takes_the_first_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (
        Engine().torch_device == torch.device("cuda")
        and Engine("cuda:1").torch_device.index == 1
        and Engine().workers == 1
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Engine().torch_device == torch.device("cpu") and Engine().workers == torch.get_num_threads()
