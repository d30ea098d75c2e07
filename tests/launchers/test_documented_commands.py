"""Every command of README and docs that starts `duet` means something."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate

from launchers.cli_help import missing

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = {"-m", "--multirun"}

TOYS = "median|own_biases|shared_early|confidence"  # run by test_guide.py


def commands():
    """Arguments of every `duet` in a block or between backticks, without those with <holes> and the toy methods."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
        lines += re.findall(r"`(duet [^`]+)`", text)
        for line in lines:
            line = line.strip()
            if line.startswith("duet ") and not re.search(
                r"<\w|\.\.\.|--help|--config-dir|median|own_biases|shared_early|confidence", line
            ):
                found[f"{page.name}: {line}"] = shlex.split(line, comments=True)[1:]
    return [pytest.param(words, id=name) for name, words in found.items()]


@pytest.mark.parametrize("words", commands())
def test_it_composes_and_its_method_builds(words):
    if (needed := missing(words)) is not None:
        pytest.skip(needed)
    overrides = OverridesParser.create().parse_overrides([word for word in words if word not in FLAGS])
    (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    is_sweep = FLAGS & set(words) or any(word.startswith("experiment=") for word in words)  # its file says so
    assert len(jobs) == 1 or is_sweep
    for job in jobs:
        with initialize_config_module("conf", version_base="1.3"):
            config = compose("config", job)
        for part in ("method", "scale", "router", "engine"):
            instantiate(config[part])
