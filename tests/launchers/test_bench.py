"""The benchmarks on a tiny tower: real processes, every row runs, and what is printed is what was computed."""

import pytest
import torch
from safetensors.torch import load_file

from launchers.bench import TABLES, factor, gpu, merge, pairs
from launchers.bench.__main__ import main
from launchers.bench.forward import rows
from launchers.bench.measure import Process, tensor_bytes
from launchers.bench.models import Models
from merging.errors import UserError

TINY = ["--arch", "tiny"]
GPU = ["gpu", *TINY, "--device", "cpu", "--batch", "2", "--repeat", "1"]


def printed(capsys, name):
    """The lines of the only table on the page, which is that of its name."""
    text = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == TABLES[name]["columns"] and all(len(line) == len(lines[0]) for line in lines)
    return lines[2:], text


def test_what_is_measured_is_printed_with_fusion_bench_beside_ours(tmp_path, monkeypatch, capsys):
    """On experts of falling spectra."""
    monkeypatch.chdir(tmp_path)
    python = tmp_path / "python"  # what has fusion-bench: NAME OUTPUT BASE EXPERT ... after the script's own path
    python.write_text('#!/bin/sh\ncp "$4" "$3"; echo working; echo "$2" >> asked; echo 0.5')
    python.chmod(0o755)
    main(["merge", *TINY, "--methods", "Ties", "TsvM", "--decaying", "--fusion-bench", str(python)])
    lines, text = printed(capsys, "merge")
    titles = ["floor: read all, write one", "content ids, once per file", "Ties", "Ties, of new files"]
    titles += ["TsvM, cold", "TsvM, warm", "FusionBench: TsvM"]
    assert [row[0] for row in lines] == titles
    *ours, theirs = lines
    assert all(float(row[index]) > 0 for row in ours for index in (1, 4, 5))
    assert all(0 <= float(row[2]) <= float(row[1]) and float(row[3]) >= 0 for row in ours)
    assert lines[0][3] == "1.00" and theirs[2] == "0.50" and "falling as 1 / k" in text
    assert (tmp_path / "asked").read_text() == "TsvM\n" and not list(tmp_path.rglob("merged*"))
    base, expert = (load_file(next(tmp_path.rglob(f"decaying/{name}.safetensors"))) for name in ("base", "expert3"))
    key = next(key for key, weight in base.items() if weight.ndim == 2 and min(weight.shape) >= 16)
    change = expert[key] - base[key]
    values = torch.linalg.svdvals(change)
    assert values[0] > 4 * values[7] and change.square().mean().sqrt() == pytest.approx(0.002, rel=0.3)


def test_every_method_that_needs_weights_alone_is_measured(tmp_path):
    names = merge.covered()
    assert names[:2] == ["TaskArithmetic", "Ties"] and len(names) == len(set(names)) > 30
    assert {"Wudi", "Swudi", "OptMerge", "Doge", "Opcm", "Emr", "ModelStock", "BayesianDataFree"} <= set(names)
    assert not {"Slerp", "Knots", "RegMean", "Duet", "Base"} & set(names)
    merge.write_inputs(tmp_path, "tiny")
    for name in ("BayesianDataFree", "ModelStock"):
        assert merge.job(name, str(tmp_path), str(tmp_path / "cache"), "tiny") > 0


def test_a_method_that_needs_more_is_refused():
    with pytest.raises(UserError, match="--methods RegMean is none of this benchmark: TaskArithmetic, Ties"):
        merge.asked(["RegMean"])


def test_decompositions_are_as_good_as_each_other(monkeypatch, capsys):
    monkeypatch.setattr(factor, "called", lambda _, __, *arguments: Process(1, 1, 1, factor.job(*arguments)))
    main(["factor", *TINY])
    lines, _ = printed(capsys, "factor")
    seconds, errors = zip(*((float(row[1]), float(row[2])) for row in lines), strict=True)
    assert len(lines) == 5 and min(seconds) > 0
    assert all(0 < error < 1 for error in errors) and errors[2] <= errors[1] and errors[3] == errors[2]


def test_all_rows_of_a_forward_are_measured_and_printed(capsys):
    main(["forward", *TINY, "--batch", "4", "--repeat", "1"])
    lines, text = printed(capsys, "forward")
    titles = [row[0] for row in lines]
    assert titles[:3] == ["static", "static, open_clip's own forward", "Duet, R = 16"]
    assert {"Duet, R = 160, loop over samples", "Duet, R = 160, a matrix per sample"} <= set(titles)
    assert {"Twin, r = 16", "Twin, r = 16, top-1, grouped", "Duet, R = 160, a gate in every block"} <= set(titles)
    assert lines[0][2:4] == ["1.000", "1.000"] and lines[1][3] == "1.000"
    assert all(float(row[1]) > 0 and float(row[2]) > 0 and float(row[4]) >= 0 for row in lines)
    macs = [float(row[3]) for row in lines if row[0].startswith("Duet") and row[0][-1].isdigit()]
    assert 1 < macs[0] < macs[1] < macs[2] < macs[3]
    assert "4 images through tiny" in text


def test_rows_compute_the_same_model_and_leave_it_as_it_was():
    """The ways to run Duet at R = 160 are ways to run one model; so are those of the static one."""
    models = Models("tiny", 3)
    with torch.inference_mode():
        outputs = {row.title: row.run() for row in rows(models) if "gate" not in row.title}
        static = models.installed({})(models.images, w=models.w)
    tolerance, duet = {"rtol": 0, "atol": 1e-4}, outputs["Duet, R = 160"]
    torch.testing.assert_close(outputs["Duet, R = 160, a matrix per sample"], duet, **tolerance)
    torch.testing.assert_close(torch.cat(outputs["Duet, R = 160, loop over samples"]), duet[:2], **tolerance)
    torch.testing.assert_close(outputs["static, open_clip's own forward"], outputs["static"], **tolerance)
    difference = duet - outputs["Duet, R = 160, a matrix per sample"]
    assert float((duet - outputs["static"]).norm()) > 4 * float(difference.norm())
    assert torch.equal(static, outputs["static"])  # also after the loops that add to weights


STEADY = "import sys\nfor line in sys.stdin: print(sys.argv[1], sys.argv[2], flush=True)"


def test_two_checkouts_take_turns_and_the_median_counts(monkeypatch, tmp_path, capsys):
    """Forwards of known cost: the older checkout takes 2 s each, this one 3."""
    child = pairs.child

    def steady(checkout, code, *arguments):
        return child(checkout, STEADY, *((2, 1.0) if checkout == tmp_path else (3, norm)))

    monkeypatch.setattr(pairs, "child", steady)
    monkeypatch.chdir(tmp_path)
    norm, command = 1.0, ["forward", *TINY, "--pairs", "3", "--against", str(tmp_path)]
    main(command)
    lines, _ = printed(capsys, "against")
    assert lines == [[name, "2.000", "3.000", "1.500", "1.500", "1.500"] for name in pairs.MODELS]
    norm = 2.0
    with pytest.raises(RuntimeError, match="compute different features"):
        main(command)


def test_training_memory_grows_with_the_core_and_not_the_matrix(capsys):
    main(["forward", *TINY, "--batch", "2", "--training-memory"])
    lines, _ = printed(capsys, "memory")
    assert [row[0] for row in lines] == ["2", "4"]
    assert all(float(second) == pytest.approx(2 * float(first), abs=0.2) for first, second in zip(*lines, strict=True))


class TestMemory:
    def test_peak_is_what_is_alive_at_once(self):
        weight, row = torch.ones(1000, 10), torch.ones(10)

        def run():
            first = weight.T @ weight  # 100 numbers
            second = weight + row  # 10,000, with the first alive
            second.view(-1).neg_()  # no more
            del second
            return first, weight + row  # the same size again

        with torch.inference_mode():
            assert tensor_bytes(run)[0] == 4 * 10_100

    def test_kept_for_backward(self):
        weight, x = torch.ones(30, 20), torch.ones(5, 20, requires_grad=True)
        assert tensor_bytes(lambda: (x @ weight.T).sum())[1] == 0
        assert tensor_bytes(lambda: (x @ weight.T).square().sum())[1] == 4 * 5 * 30


def test_every_row_agrees_with_double_precision(capsys):
    main(GPU)
    lines, _ = printed(capsys, "gpu")
    costs = {row[1]: (float(row[2]), float(row[3])) for row in lines}
    assert {"forward, static, fp32", "forward, Duet, R = 64, bf16", "forward, Twin, r = 16, fp32"} <= costs.keys()
    assert {f"merge, {name}" for name in gpu.METHODS} < costs.keys() and "merge, Tucker of 24 FFN matrices" in costs
    for title, (seconds, error) in costs.items():
        assert seconds > 0 and error <= (5e-2 if "bf16" in title else 1e-4)
    assert costs["forward, static, bf16"][1] > costs["forward, static, fp32"][1] > 0


def test_no_row_begins_when_the_time_is_over(capsys):
    main([*GPU, "--minutes", "0"])
    assert {row[2] for row in printed(capsys, "gpu")[0]} == {"not begun: out of time"}


def test_an_error_beyond_its_tolerance_ends_the_command(monkeypatch):
    monkeypatch.setattr(gpu, "METHODS", ("TaskArithmetic",))
    monkeypatch.setitem(gpu.TOLERANCES, "fp32", 0.0)
    with pytest.raises(SystemExit, match=r"not what the CPU computes in double precision: tiny, forward, static, fp32"):
        main(GPU)


def test_without_a_gpu_the_command_says_how_to_try_its_code(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu --arch tiny"):
        main(["gpu"])
