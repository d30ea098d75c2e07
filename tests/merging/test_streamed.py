"""Merges whose changes are too large to be kept: computed from the files while they are written."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import equal, family

from launchers.bench.measure import tensor_bytes
from merging import combined, entries, merge, merged, qkv, saving, sparsifiers
from merging.methods import (
    Average,
    Breadcrumbs,
    Consensus,
    Dare,
    Della,
    LocalizeAndStitch,
    MagMax,
    Pcb,
    Ram,
    Sce,
    TaskArithmetic,
    Ties,
    dare,
)
from merging.threads import in_order

SHAPES = {
    "h.0.attn.c_attn.weight": (8, 24), "h.0.mlp.c_fc.weight": (9, 13), "h.0.ln_1.weight": (8,), "wte.weight": (30, 8),
    "zero": (0, 3), "one": (),
}  # fmt: skip
METHODS = [
    Average(), TaskArithmetic(0.4), Ties(0.3, scale=0.7), Ties(0.5, merge="mean"), Dare(0.5), Dare(0.5, then=Ties(0.4)),
    Breadcrumbs(0.5, 0.1), Della(then=Ties(0.5)),
    MagMax(), Pcb(0.2), Sce(), Sce(0.5),
    Consensus(), Consensus("ties", density=0.5), Ram(factor=1.2), Ram(0.1, 1.2, scope="parameter"),
    LocalizeAndStitch(0.3),
]  # fmt: skip


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def streaming(request, monkeypatch):
    """Parameters of several blocks, blocks of several spans, spans of several pieces; returns what keeps nothing."""
    for module in (combined, dare, entries, merged, qkv, saving, sparsifiers):
        for name, size in (("BLOCK", 64), ("SPAN", 16), ("PIECE", 8)):
            monkeypatch.setattr(module, name, size, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield lambda: monkeypatch.setattr(entries, "KEPT", 0)
    torch.set_num_threads(threads)


def files(folder, states):
    for number, state in enumerate(states):
        save_file(state, folder / f"{number}")
    return [folder / f"{number}" for number in range(len(states))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_equal_to_a_merge_in_memory(method, dtype, streaming, tmp_path):
    """Numbers of few bits, so that entries cancel exactly and many are equal at the threshold."""
    base, tuned = family(3, SHAPES, size=0.25, spread=0.0625)
    coarse = [
        {key: (16 * tensor).round().div(16).to(dtype) for key, tensor in state.items()} for state in (base, *tuned)
    ]
    paths = files(tmp_path, [state | {"steps": torch.arange(40)} for state in coarse])
    kept = merge(method, paths[0], paths[1:])
    known = load_file(kept.save(tmp_path / "kept.safetensors"))
    streaming()

    found = merge(method, paths[0], paths[1:])

    terms = combined.terms(found.shared)
    assert terms and all(isinstance(term, combined.Computed) for term in terms.values())
    assert equal(load_file(found.save(tmp_path / "streamed.safetensors")), known)
    assert all(torch.equal(found.static(key), kept.static(key)) for key in found.specs)
    again = [each.scaled(0.9).save(tmp_path / f"again{index}.safetensors") for index, each in enumerate((found, kept))]
    assert equal(*map(load_file, again))


def test_coefficients_by_kind(streaming, tmp_path):
    base, tuned = family(2, {key: SHAPES[key] for key in list(SHAPES)[:4]})
    paths = files(tmp_path, [base, *tuned])
    method = TaskArithmetic(0.4, kinds={"attention": 0.5, "norm": 0.0})
    kept = dict(merge(method, paths[0], paths[1:]).state())
    streaming()
    assert equal(dict(merge(method, paths[0], paths[1:]).state()), kept)


@pytest.mark.parametrize(
    "method",
    [Average(), Average(kinds={"ffn": 0.5}), TaskArithmetic(0.4), TaskArithmetic(kinds={"attention": 0.5}), Dare(0.5),
     Dare(0.5, then=TaskArithmetic(kinds={"norm": 0.0}))],
    ids=str,
)  # fmt: skip
def test_memory_does_not_grow_with_the_model(method, streaming, tmp_path):
    """A matrix thirty times larger takes a few of its blocks; TIES, left out, keeps 64 MB more."""
    peaks = []
    for rows in (8, 240):
        shapes = {"h.0.attn.c_attn.weight": (rows, 24), "h.1.mlp.c_fc.weight": (rows, 24), "h.0.ln_1.weight": (8,)}
        base, tuned = family(3, shapes)
        (folder := tmp_path / str(rows)).mkdir()
        paths = files(folder, [base, *tuned])
        del base, tuned
        streaming()
        run = lambda: merge(method, paths[0], paths[1:]).save(folder / "merged.safetensors")  # noqa: B023, E731
        peaks.append(tensor_bytes(run)[0])
    assert peaks[1] < 4 * 240 * 24 and peaks[1] < 3 * peaks[0] + 4096  # less than one matrix in fp32


def test_what_lies_in_memory_is_merged_at_once(streaming):
    """Its tensors may be written into later."""
    base, tuned = family(2)
    streaming()
    found = merge(Average(), base, tuned)
    assert not any(isinstance(term, combined.Computed) for term in combined.terms(found.shared).values())


def test_a_matrix_of_adapters_is_multiplied_in_spans(streaming):
    low_rank = combined.LowRank(torch.randn(30, 4), torch.randn(4, 7), 2)
    mix = combined.Mix(low_rank, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(mix.whole(), low_rank.mix(mix.weights))
    changes = combined.Combined({"w": mix})
    blocks = [
        torch.cat(list(spans))
        for first in range(0, 210, 64)
        if (spans := combined.spans(changes, "w", first, min(first + 64, 210)))
    ]
    assert torch.equal(torch.cat(blocks).view(30, 7), changes["w"])


def test_few_results_wait(streaming):
    begun = []
    results = in_order(lambda item: begun.append(item) or item, range(50))
    assert next(results) == 0 and len(begun) <= 4
    assert list(results) == list(range(1, 50))
