"""The forward benchmark on a tiny tower: every row runs, and what it prints is what was computed."""

import pytest
import torch

from launchers.bench import pairs
from launchers.bench.__main__ import main
from launchers.bench.forward import Bench
from launchers.bench.memory import peak, saved


def table(text):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return lines[0], lines[2:]


def test_all_rows_are_measured_and_printed(tmp_path, capsys):
    page = tmp_path / "performance.md"
    main(["forward", "--arch", "tiny", "--batch", "4", "--repeat", "1", "--output", str(page)])
    text = capsys.readouterr().out
    head, rows = table(text)
    assert head == ["", "ms per batch", "ratio to static", "ratio in MACs", "peak memory, MiB"]
    titles = [row[0] for row in rows]
    assert titles[:3] == ["static", "static, open_clip's own forward", "Duet, R = 16"]
    assert {"Duet, R = 160, loop over samples", "Duet, R = 160, a matrix per sample"} <= set(titles)
    assert {"Twin, r = 16", "Twin, r = 16, top-1, grouped", "Duet, R = 160, a gate in every block"} <= set(titles)
    assert rows[0][2:4] == ["1.000", "1.000"] and rows[1][3] == "1.000"
    assert all(float(row[1]) > 0 and float(row[2]) > 0 and float(row[4]) >= 0 for row in rows)
    macs = [float(row[3]) for row in rows if row[0].startswith("Duet") and row[0][-1].isdigit()]
    assert 1 < macs[0] < macs[1] < macs[2] < macs[3]
    assert text.strip() in page.read_text()
    assert "4 images through tiny" in text


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_compute_the_same_model(dtype):
    """The ways to run Duet at R = 160 are ways to run one model; so are those of the static one."""
    found = Bench("tiny", 3, "cpu", dtype)
    with torch.inference_mode():
        done = {row.title: row.run() for row in found.rows() if "gate" not in row.title and "added" not in row.title}
    tolerance = {"rtol": 0, "atol": 1e-4 if dtype == "fp32" else 0.15}
    duet = done["Duet, R = 160"]
    torch.testing.assert_close(done["Duet, R = 160, a matrix per sample"], duet, **tolerance)
    torch.testing.assert_close(torch.cat(done["Duet, R = 160, loop over samples"]), duet[:2], **tolerance)
    torch.testing.assert_close(done["static, open_clip's own forward"], done["static"], **tolerance)
    assert float((duet - done["static"]).norm()) > 4 * float((duet - done["Duet, R = 160, a matrix per sample"]).norm())


def test_the_published_loop_leaves_the_model_as_it_was():
    found = Bench("tiny", 2, "cpu", "fp32")
    *_, loop = found.rows()
    before = found.models.installed({})(found.images, w=found.w)
    loop.run()
    assert torch.equal(found.models.installed({})(found.images, w=found.w), before)


STEADY = "import sys\nfor line in sys.stdin: print(sys.argv[1], sys.argv[2], flush=True)"


def test_two_checkouts_take_turns_and_the_median_counts(monkeypatch, tmp_path, capsys):
    """Forwards of known cost: the older checkout takes 2 s each, this one 3."""
    child = pairs.child

    def steady(checkout, code, *arguments):
        return child(checkout, STEADY, *((2, 1.0) if checkout == tmp_path else (3, norm)))

    monkeypatch.setattr(pairs, "child", steady)
    monkeypatch.chdir(tmp_path)
    norm, command = 1.0, ["forward", "--arch", "tiny", "--pairs", "3", "--against", str(tmp_path)]
    main(command)
    _, rows = table(capsys.readouterr().out)
    assert rows == [[name, "2.000", "3.000", "1.500", "1.500", "1.500"] for name in pairs.MODELS]
    norm = 2.0
    with pytest.raises(RuntimeError, match="compute different features"):
        main(command)


def test_training_memory_grows_with_the_core_and_not_the_matrix(capsys):
    main(["forward", "--arch", "tiny", "--batch", "2", "--training-memory"])
    _, rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["2", "4"]
    assert all(float(second) == pytest.approx(2 * float(first), abs=0.2) for first, second in zip(*rows, strict=True))


class TestMemory:
    def test_peak_is_what_is_alive_at_once(self):
        weight = torch.ones(1000, 10)

        def run():
            first = weight.T @ weight  # 100 numbers
            second = weight * 2  # 10,000, with the first alive
            second.view(-1).add_(1)  # no more
            del second
            return first, weight * 3  # the same size again

        with torch.inference_mode():
            assert peak(run, "cpu") == 4 * 10_100

    def test_saved_for_backward(self):
        weight, x = torch.ones(30, 20), torch.ones(5, 20, requires_grad=True)
        assert saved(lambda: (x @ weight.T).sum(), [weight]) == 0
        assert saved(lambda: (x @ weight.T).square().sum(), [weight]) == 4 * 5 * 30
