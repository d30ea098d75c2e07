"""The Python of README and docs runs as written."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import merging

ROOT = Path(__file__).resolve().parent.parent


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), re.S)


@pytest.mark.parametrize("number", range(len(blocks("README.md", "python"))))
def test_readme_example(number, tmp_path, monkeypatch, capsys):
    code = blocks("README.md", "python")[number]
    for name in ("base", "a", "b"):
        save_file(dict(torch.nn.Linear(8, 4).state_dict()), tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"README.md block {number}", "exec"), {})
    assert "tensor(" in capsys.readouterr().out
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


def test_toy_method_of_the_guide():
    method_file, config = blocks("docs/adding-a-method.md", "python")[0], blocks("docs/adding-a-method.md", "yaml")[0]
    names: dict[str, type] = {}
    exec(compile(method_file, "docs/adding-a-method.md", "exec"), names)
    knobs = yaml.safe_load(config)
    assert knobs.pop("_target_") == "merging.methods.median.Median"
    experts = [{"weight": torch.full((2, 3), value)} for value in (1.0, 2.0, 9.0)]
    merged = merging.merge(names["Median"](**knobs), {"weight": torch.zeros(2, 3)}, experts)
    assert torch.equal(merged.weight("weight"), torch.full((2, 3), 2.0))


def test_toy_routed_method_of_the_guide():
    names: dict[str, type] = {}
    exec(compile(blocks("docs/adding-a-method.md", "python")[1], "docs/adding-a-method.md", "exec"), names)
    key, weight = "visual.transformer.resblocks.0.ln_1.bias", "visual.transformer.resblocks.0.attn.out_proj.weight"
    experts = [{key: torch.full((3,), value), weight: torch.full((3, 3), value)} for value in (1.0, 5.0)]
    merged = merging.merge(names["OwnBiases"](), {key: torch.zeros(3), weight: torch.zeros(3, 3)}, experts)
    for task in range(2):
        state = dict(merged.state(merged.one_hot(task)))
        assert torch.equal(state[key], experts[task][key]) and torch.equal(state[weight], torch.full((3, 3), 3.0))
