# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`benchmarks/data_check.py` at toy size."""

import json
import sys
from pathlib import Path

import pytest
from helpers.tiny_models import build_config, build_processor

from vtlmm.data.rows import load_rows


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_a_file_is_checked_with_and_without_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import data_check

    build_config().save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(data_check, "ROWS_PER_PART", 8)
    assert [len(load_rows(path)) for path in data_check.write_rows(tmp_path, 20)] == [20, 20, 20]
    command = ["data_check.py", "--model", str(tmp_path / "model"), "--rows", "20", "--formats", "json"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(tmp_path / "a.json")])
    data_check.main()
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert list(results) == ["json, empty", "json, full"] and capsys.readouterr().out.count("\n| ") == 3
    assert all(values["cpu_seconds"] > 0 and values["peak_rss_mib"] > 50 for values in results.values())
