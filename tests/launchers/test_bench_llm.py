"""The benchmark of a language model on a tiny one: from folders to a folder, and what larger models come to."""

import os
from importlib import import_module

import pytest
import yaml

pytest.importorskip("transformers")

from launchers.bench import MODELS, TABLES, llm
from launchers.bench.__main__ import main
from launchers.bench.measure import MIB, Process


def in_process(title, call, *arguments):
    module, function = call.split(":")
    return Process(2.0, 1.0, 5 * MIB, getattr(import_module(module), function)(*map(str, arguments)))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(llm, "called", in_process)
    monkeypatch.setitem(MODELS, "llama_7b", MODELS["llama_tiny"])
    monkeypatch.setitem(MODELS, "llama_72b", {**MODELS["llama_tiny"], "num_hidden_layers": 30})
    return ["llm", "--model", "llama_tiny", "--folder", str(tmp_path / "llm"), "--mergekit", str(tmp_path / "mk")]


def test_methods_run_from_folders_and_larger_models_are_foreseen(tiny, tmp_path, capsys):
    main([*tiny, "--methods", "TaskArithmetic", "Ties", "Dare", "TsvM"])
    text = capsys.readouterr().out
    tables = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    start = tables.index(TABLES["foreseen"]["columns"])
    rows, larger = tables[2:start], tables[start + 2 :]
    assert [row[0] for row in rows] == ["floor", "content ids, once per file", "TaskArithmetic", "Ties", "Dare", "TsvM"]
    assert rows[0][3] == "1.00" and all(float(row[2]) >= 0 and row[5] == "5" for row in rows)
    assert "2 of 3 blocks" in text and "extrapolated" in text
    assert [row[0] for row in larger] == ["llama_7b", "llama_72b"] and all(row[5] == "5" for row in larger)
    assert float(larger[1][4]) >= float(larger[1][2]) and not (tmp_path / "llm").exists()


def test_mergekit_merges_the_same_folders_where_it_is_installed(tiny, tmp_path, capsys):
    program = tmp_path / "mk"
    program.write_text('#!/bin/sh\ncp "$1" "$(dirname "$0")/recipe.yaml"\n')
    os.chmod(program, 0o755)
    main([*tiny, "--methods", "Ties", "--keep"])
    assert "| mergekit: Ties |" in capsys.readouterr().out
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert recipe["merge_method"] == "ties" and len(recipe["models"]) == llm.EXPERTS
    assert all((tmp_path / "llm" / f"expert{task}" / "config.json").exists() for task in range(llm.EXPERTS))
