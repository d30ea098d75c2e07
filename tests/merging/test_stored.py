"""What is counted is what a file holds, and what is scored is what a file computes: every method and dtype."""

import json
import struct

import pytest
import torch
from samples import drawn, equal, every_method, family, merged_of, models, quantising, quick, suited, tower

from merging import UserError, merge, open_merged
from merging.checkpoints import SafetensorsFile
from merging.deltas import Dense, Rows, Sparse, rebuild
from merging.deltas.masked import packed, unpacked
from merging.fit.gates import Learned, TaskId
from merging.methods import Average, Emr, Twin, Wemoe
from merging.routing.gates import GateShape

METHODS = [pytest.param(quick(each), id=each.__name__) for each in (*every_method(), *quantising())]
METHODS += [pytest.param(Wemoe(0.05), id="pruned"), pytest.param(Twin(sparsify="dropout"), id="dropped")]
METHODS += [pytest.param(Twin(sparsify="magnitude", keep=0.05), id="largest")]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def in_file(path):
    """Bytes of all tensors, by the offsets in the header."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    sizes = [end - start for start, end in (entry["data_offsets"] for entry in header.values())]
    assert sum(sizes) == len(content) - 8 - length
    return sum(sizes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_counted_is_written_and_what_is_written_was_scored(method, dtype, tmp_path):
    merged = merged_of(method, *family(3, suited(method), dtype))
    path = merged.save(tmp_path / "merged.safetensors")
    assert merged.stored_bytes == in_file(path)
    specs = SafetensorsFile(path).specs()
    assert all(specs[key].dtype == dtype for key in merged.specs.keys() - merged.packed.keys())
    assert all(map(equal, models(open_merged(path)), models(merged)))


def test_trained_gates_are_counted_as_written(tmp_path):
    """Batch norm counts its batches in 64 bits."""
    from samples import context, opened, tower

    found = opened(*family(3, tower(), size=0.25, spread=0.0625))
    gate = Learned("task_id", GateShape("pass", 3, "mean"), TaskId(steps=2), "test")
    merged = gate.fit(Twin()(found), found, context(found))[0]
    assert merged.stored_bytes == in_file(merged.save(tmp_path / "merged.safetensors"))


@pytest.mark.parametrize("name", HALF)
def test_another_dtype_is_scored_counted_and_saved(name, tmp_path):
    merged = merged_of(Wemoe(), *family(3, tower()))
    for made in (merged.cast(name), merged):
        path = made.save(tmp_path / f"{name}.safetensors", dtype=name)
        assert merged.cast(HALF[name]).stored_bytes == in_file(path) < merged.stored_bytes
        assert all(map(equal, models(open_merged(path)), models(merged.cast(name))))
    key = "visual.conv1.weight"  # no part of it depends on the input
    assert torch.equal(merged.cast(name).weight(key), merged.weight(key).to(HALF[name]).float())
    assert open_merged(path).deltas.keys() == merged.deltas.keys()


@pytest.mark.parametrize("dtype", ["fp8", "float32", torch.int8, torch.float64, 16])
def test_dtypes_that_no_merge_is_saved_in(dtype, tmp_path):
    with pytest.raises(UserError, match=r"is none that a merge is saved in. Choose one of fp32, bf16, fp16"):
        merge(Average(), *family(2)).save(tmp_path / "merged.safetensors", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_a_number_that_its_dtype_has_not_is_refused(tmp_path):
    """0.5 (60000 + 80000) is 70000, and fp16 ends at 65504; bf16 reaches as far as fp32."""
    base = {"a": torch.zeros(2), "w": torch.full((3,), 6e4)}
    merged = merge(Average(), base, [base, {"a": torch.zeros(2), "w": torch.full((3,), 8e4)}])
    with pytest.raises(UserError, match=r"^w has numbers up to 7e\+04, beyond the largest of float16, 6.55e\+04"):
        merged.save(tmp_path / "merged.safetensors", dtype="fp16")
    assert not list(tmp_path.iterdir())
    saved = open_merged(merged.save(tmp_path / "merged.safetensors", dtype="bf16")).weight("w")
    assert torch.equal(saved, torch.full((3,), 7e4).bfloat16().float())
    halves = {"w": torch.full((3,), 6e4).half()}
    doubled = merge(lambda experts: experts.merged(experts.map(lambda key, tau: tau.sum(0) + 6e4)), halves, [halves])
    with pytest.raises(UserError, match="beyond the largest of float16"):  # where it is scored, too
        doubled.weight("w")


@pytest.mark.parametrize("shape", [(5,), (), (7, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_delta_is_exact(shape, dtype):
    changes = drawn(3, *shape).to(dtype)
    changes[drawn(3, *shape, seed=1) < 1.5] = 0
    delta = Sparse.of(changes, torch.Size(shape))
    kept = [value for value in changes.flatten().tolist() if value]
    assert delta.values.tolist() == kept and delta.bits.numel() == -(-changes.numel() // 8)
    assert [bool(int(delta.bits[i // 8]) >> i % 8 & 1) for i in range(changes.numel())] == [
        bool(value) for value in changes.flatten().tolist()
    ]
    again = rebuild(delta.facts(), dict(delta.named_buffers()))
    assert torch.equal(again.changes, changes) and again.shape == shape and again.parts == 3


def test_sparse_deltas_inside_rows_are_compressed_too():
    sparse, full = torch.zeros(2, 4, 6), drawn(2, 3, 6)
    sparse[0, 1, 2] = 3
    rows = Rows([Dense(sparse), Dense(full)])
    stored = rows.stored()
    assert rows.bytes == stored.bytes == 4 + 6 + full.nbytes and rows.params == 1 + 2 + full.numel()
    again = rebuild(stored.facts(), dict(stored.named_buffers()))
    assert torch.equal(again.mix(torch.eye(2)), torch.cat([sparse, full], 1))


def test_bits_of_any_length():
    for count in range(18):
        flags = drawn(2, count, seed=count) > 0
        assert torch.equal(torch.stack([unpacked(bits, count) for bits in packed(flags)]), flags)


class TestFormats:
    def test_a_file_of_the_first_format_is_read(self, tmp_path):
        """It held the dense part beside deltas in fp32, and dense deltas as they are."""
        from test_saving import rewritten

        base, experts = family(2, tower(), torch.bfloat16)
        merged = merged_of(Wemoe(0.05), base, experts).cast("fp32")
        path = merged.save(tmp_path / "merged.safetensors")

        def older(tensors, header):
            header["format"] = "duet-merging/1"
            del header["written_by"]
            deltas = json.loads(header["banks"])
            for key, facts in deltas.items():
                if facts["kind"] == "Sparse":
                    bits = [tensors.pop(f"own/{key}/{name}") for name in ("values", "bits")]
                    tensors[f"own/{key}/changes"] = merged.deltas[key].changes
                    facts["kind"] = "Dense"
                    assert len(bits) == 2
            header["banks"] = json.dumps(deltas)

        assert all(map(equal, models(open_merged(rewritten(path, older))), models(merged)))

    def test_blocks_of_rows_by_their_names_in_the_second_format(self, tmp_path):
        from test_saving import rewritten

        merged = merged_of(Twin(), *family(2, tower()))
        path = merged.save(tmp_path / "merged.safetensors")

        def older(tensors, header):
            header["format"] = "duet-merging/2"
            assert "blocks" in header["banks"]
            header["banks"] = header["banks"].replace('"blocks"', '"banks"')
            for name in [name for name in tensors if "/blocks." in name]:
                tensors[name.replace("/blocks.", "/banks.")] = tensors.pop(name)
            header["same"] = header["same"].replace("/blocks.", "/banks.")

        assert all(map(equal, models(open_merged(rewritten(path, older))), models(merged)))

    @pytest.mark.parametrize(
        ("knobs", "same"),
        [
            ({"top_k": 1}, True),
            ({"top_k": 1, "granularity": "batch"}, False),
            ({"top_k": 1, "pool": "after", "features": "mean"}, False),
            ({"pool": "after", "features": "mean"}, True),
            ({"activation": "soft_top_k"}, False),
        ],
    )
    def test_gates_of_the_first_format_that_meant_another_choice(self, tmp_path, knobs, same):
        from test_saving import made, rewritten

        path = made(Wemoe(), GateShape(**knobs)).save(tmp_path / "merged.safetensors")
        rewritten(path, lambda _, header: header.update(format="duet-merging/1"))
        if same:
            assert open_merged(path).routing.gate == GateShape(**knobs)
        else:
            with pytest.raises(UserError, match="the average is taken first"):
                open_merged(path)

    def test_a_later_format_says_who_reads_it(self, tmp_path):
        from test_saving import rewritten

        path = merge(Emr(), *family(2)).save(tmp_path / "merged.safetensors")
        header = SafetensorsFile(path).metadata
        assert header["format"] == "duet-merging/3" and header["written_by"].startswith("duet-merging ")
        rewritten(path, lambda _, header: header.update(format="duet-merging/5", written_by="duet-merging 9.1.0"))
        with pytest.raises(UserError, match=r"of format duet-merging/5, written by duet-merging 9.1.0; .* up to 4"):
            open_merged(path)
        for foreign in ("other/2", "duet-merging", "duet-merging/x", ""):
            rewritten(path, lambda _, header, foreign=foreign: header.update(format=foreign))
            with pytest.raises(UserError, match="was not written by this library"):
                open_merged(path)
