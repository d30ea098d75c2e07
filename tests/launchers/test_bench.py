"""The benchmark measures real processes: a tiny tower goes the whole way."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from launchers.bench.__main__ import main
from launchers.bench.measure import write_section
from launchers.bench.merge import MADE, write_inputs
from launchers.bench.models import Models
from merging import UserError


def test_floor_and_methods_are_measured_and_printed(tmp_path, capsys):
    page = tmp_path / "performance.md"
    command = ["merge", "--folder", str(tmp_path), "--arch", "tiny", "--output", str(page)]
    main([*command, "--methods", "Ties", "TsvM"])
    text = capsys.readouterr().out
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    assert head == ["", "seconds", "of it merge + save", "times the floor", "CPU seconds", "peak memory, MiB"]
    titles = ["floor: read all, write one", "content ids, once per file", "Ties", "Ties, of new files"]
    titles += ["TsvM, cold", "TsvM, warm"]
    assert [row[0] for row in rows] == titles
    assert all(float(row[index]) > 0 for row in rows for index in (1, 4, 5))
    assert all(0 <= float(row[2]) <= float(row[1]) and float(row[3]) >= 0 for row in rows)
    assert rows[0][3] == "1.00"
    assert not list(tmp_path.glob("merged*"))
    assert text.strip() in page.read_text()


def test_section_is_replaced_and_the_rest_of_the_page_kept(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text("# Speed\n\nBefore.\n")
    for text in ("old", "new"):
        write_section(page, "merge", text)
    page.write_text(page.read_text() + "\nAfter.\n")
    write_section(page, "merge", "newest")
    section = "<!-- bench merge -->\nnewest\n<!-- end of bench merge -->"
    assert page.read_text() == f"# Speed\n\nBefore.\n\n{section}\n\nAfter.\n"


def test_files_of_others_are_not_written_over(tmp_path, capsys):
    """Inputs that it made for another size are made again, those of somebody else are kept."""
    mine = tmp_path / "base.safetensors"
    save_file({"w": torch.ones(2)}, mine)
    with pytest.raises(UserError, match=r"base.safetensors is there and was not made by this benchmark"):
        write_inputs(tmp_path, "tiny")
    assert torch.equal(load_file(mine)["w"], torch.ones(2))
    save_file({"w": torch.ones(2)}, mine, MADE)
    write_inputs(tmp_path, "tiny")
    shapes = {key: weight.shape for key, weight in Models("tiny").weights.items()}
    assert {key: tensor.shape for key, tensor in load_file(mine).items()} == shapes
    with pytest.raises(SystemExit):
        main(["merge", "--output", str(mine)])
    assert "is no markdown file" in capsys.readouterr().err
