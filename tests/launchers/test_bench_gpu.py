"""The GPU benchmark, its code path on the CPU: every row runs and is checked."""

import pytest

from launchers.bench import gpu
from launchers.bench.__main__ import main

TINY = ["gpu", "--device", "cpu", "--arch", "tiny", "--batch", "2", "--repeat", "1"]


def table(text):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return lines[2:]


def test_every_row_runs_and_agrees_with_double_precision(capsys):
    main(TINY)
    rows = {row[1]: (float(row[2]), float(row[3])) for row in table(capsys.readouterr().out)}
    assert {"forward, static, fp32", "forward, Duet, R = 64, bf16", "forward, Twin, r = 16, fp32"} <= rows.keys()
    assert {f"merge, {name}" for name in gpu.METHODS} < rows.keys() and "merge, Tucker of 24 FFN matrices" in rows
    for title, (seconds, error) in rows.items():
        assert seconds > 0 and error <= (5e-2 if "bf16" in title else 1e-4)
    assert rows["forward, static, bf16"][1] > rows["forward, static, fp32"][1] > 0


def test_no_row_begins_when_the_time_is_over(capsys):
    main([*TINY, "--minutes", "0"])
    assert {row[2] for row in table(capsys.readouterr().out)} == {"not begun: out of time"}


def test_an_error_beyond_its_tolerance_ends_the_command(monkeypatch):
    monkeypatch.setattr(gpu, "METHODS", ("TaskArithmetic",))
    monkeypatch.setitem(gpu.TOLERANCES, "fp32", 0.0)
    with pytest.raises(SystemExit, match=r"not what the CPU computes in double precision: tiny, forward, static, fp32"):
        main(TINY)


def test_without_a_gpu_the_command_says_how_to_try_its_code(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu --arch tiny"):
        main(["gpu"])
