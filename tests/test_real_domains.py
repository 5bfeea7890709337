# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The script that measures images of other domains, at toy size."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.composition import tower_folder  # noqa: F401 - a fixture
from helpers.photo_parts import parts, photo  # noqa: F401 - a fixture
from helpers.tiny_models import build_processor

from vtlmm.data.rows import load_rows


@pytest.fixture
def script(monkeypatch):
    """Return the script as a module, with fewer images."""
    path = Path(__file__).parents[1] / "benchmarks" / "real_domains.py"
    spec = importlib.util.spec_from_file_location("real_domains", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "NUM_IMAGES", 8)
    return module


def write_domains(script, data: Path) -> None:
    """Write images of four colors with the columns of the shared data. Rows of one label are adjacent."""
    for file, column in script.DOMAINS.values():
        rows = []
        for number in sorted(range(8), key=lambda number: number % 4):
            word, content = photo(number)
            row = {"image": {"path": f"{number}.png", "bytes": content}}
            labels = {"organ": "CHEST" if number % 4 else "HEAD", "descriptions": [f"{word} boat"] * 9}
            rows.append(row if column is None else {**row, column: labels.get(column, word)})
        (data / file).parent.mkdir(exist_ok=True)
        Dataset.from_list(rows).to_parquet(data / file)


@pytest.mark.slow
def test_all_domains_are_measured(script, parts, build_model, tmp_path, monkeypatch):
    write_domains(script, parts / "data")
    real = tmp_path / "real"
    build_model().save_pretrained(real / "start")
    build_processor().save_pretrained(real / "start")
    load_rows(str(parts / "data/flickr8k_700/flickr8k_700.parquet")).to_parquet(real / "words.parquet")
    command = ["real_domains.py", str(parts), str(real), str(real / "start"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    script.main()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["words"]) == ["photos (Flickr8k)", *script.DOMAINS]
    assert all(len(measured["entropies"]) == 8 for measured in results["words"].values())
    assert results["words"]["photos (Flickr8k)"]["auroc"] is None
    [matching] = results["matching"].values()
    assert set(matching) == set(script.DOMAINS) - {"blood cells (BCCD)"}  # all its images have one label
    assert all(len(measured["scores"]) == 8 for measured in matching.values())
    table = (tmp_path / "out/results.md").read_text()
    assert table.count("\n| ") == 8 + 3  # two headers without their first line


def test_neighbors_have_different_labels(script, parts, tmp_path):
    write_domains(script, parts / "data")
    rows = script.domain_rows(parts / "data", "satellite (RSSCN7)", tmp_path)
    labels = [row["messages"][-1]["content"][0]["text"] for row in rows]
    assert len(labels) == 8 and all(labels[i] != labels[i - 1] for i in range(8))
