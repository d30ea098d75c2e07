"""`python -m launchers.motivation`: its file, and what the report makes of it."""

import json
import sys

import console
import pytest
from cells import make_row

from launchers import motivation, report, rows


@pytest.fixture
def motivation_here(monkeypatch, capsys, tmp_path):
    """Runs the command in this process: (exit status, stdout, stderr)."""

    def call(output, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", console.command(output, *arguments))
        with console.logging_kept(), pytest.raises(SystemExit) as stop:
            motivation.main()
        return stop.value.code or 0, *capsys.readouterr()

    return call


def test_it_measures_every_layer_and_the_report_draws_it(output, motivation_here, tmp_path):
    status, page, errors = motivation_here(output, "method.neurons.ratio=0.25", "mass=0.9")
    assert status == 0, errors
    (path,) = (output / "motivation").glob("*.json")
    (measured,) = motivation.read(path.parent)
    assert measured.tasks == ["cars", "digits"] and measured.ratio == 0.25 and list(measured.blocks) == list("01234")
    assert set(measured.checkpoints) == {"base", "cars", "digits"} and len(measured.matrices) == 10
    for block in measured.blocks.values():
        assert block["hidden"] == 768 and block["kept"] == 0.25 and block["chance"] == pytest.approx(0.25 / 1.75)
        assert all(0.1 < share < 0.9 for share in block["active"]) and block["overlap"][0][0] == 1
    for matrix in measured.matrices.values():
        modes = matrix["modes"]
        assert modes["task"]["ranks"] == [1, 2] and modes["task"]["energy"][1] == 1
        full = [min(size, 2 * other) for size, other in (matrix["shape"][1:], matrix["shape"][:0:-1])]
        assert [modes[side]["ranks"][-1] for side in ("out", "in")] == full
    assert "at random" in page and "0.143" in page and str(path.name) in errors

    smaller = motivation_here(output, "method.neurons.ratio=0.1")
    assert smaller[0] == 0 and len(list((output / "motivation").glob("*.json"))) == 2
    rows.write(make_row(), output / "results")
    report.main(
        [str(output / "results"), "--output", str(tmp_path / "page.html"), "--figures", str(tmp_path / "drawn")]
    )
    text = (tmp_path / "page.html").read_text()
    assert text.count("What DuetMerging builds on: mini8, seed 0") == 2 and "Masks of 25 % of the neurons" in text
    for name in ("active", "spectra", "overlap"):
        assert (tmp_path / "drawn" / f"motivation-{measured.run_id}-{name}.pdf").exists()


def test_what_cannot_be_measured_is_one_paragraph(output, motivation_here):
    for wrong, message in (("method=ties", "choose method=duet"), ("mass=0", "mass=0 is out of range")):
        status, _, errors = motivation_here(output, wrong)
        assert status == 1 and message in errors and "Traceback" not in errors
    assert not (output / "motivation").exists()


def test_a_damaged_file_is_named_and_left_out(tmp_path, caplog):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text(json.dumps({"suite": "mini8"}))
    assert motivation.read(tmp_path) == [] and caplog.text.count("skipped") == 2
