"""The Python of README and docs runs as written."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
    assert re.search(r"tensor\(|'mnli': ", capsys.readouterr().out)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
