"""Reads what an offline W&B run wrote, byte by byte, without W&B's own reader."""

import json
import struct
import time
import zlib
from collections import defaultdict


def records(path):
    """The records of an offline run: a 7-byte header, then LevelDB framing (crc32, length, kind) of protobufs."""
    from wandb.proto import wandb_internal_pb2 as wire

    content, place, parts = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        checksum, size, kind = struct.unpack("<IHB", content[place : place + 7])
        part = content[place + 7 : place + 7 + size]
        if len(part) < size:
            return
        assert zlib.crc32(part, zlib.crc32(bytes([kind]))) == checksum
        place, parts = place + 7 + size, parts + part
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wire.Record.FromString(parts)
            parts = b""


def ended(folder, run_id):
    """The records of the one run of this id, which has ended."""
    (path,) = folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    deadline = time.monotonic() + 20  # W&B's writer may close the file a moment after the run ended
    while not any(record.HasField("exit") for record in records(path)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return list(records(path))


def read_run(folder, run_id):
    """The config, history and summary of the one run of this id, and its exit code."""
    config, history, summary, exit_code = {}, defaultdict(list), {}, None
    for record in ended(folder, run_id):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            for item in record.history.item:
                history[".".join(item.nested_key) or item.key].append(json.loads(item.value_json))
        elif kind == "summary":
            summary |= {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.summary.update}
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return config, history, summary, exit_code


def group(folder, run_id):
    """What gathers the one run of this id with others."""
    return next(each.run.run_group for each in ended(folder, run_id) if each.WhichOneof("record_type") == "run")


def artifacts(folder, run_id):
    """What the one run of this id stores as artifacts, its table too."""
    return [each.artifact for each in ended(folder, run_id) if each.WhichOneof("record_type") == "artifact"]
