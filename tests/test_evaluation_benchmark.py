# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`benchmarks/evaluation.py` at toy size."""

import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.serving import build_serving_model
from helpers.tiny_models import build_processor
from PIL import Image as PILImage


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_versions_are_timed_and_their_answers_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import evaluation

    build_serving_model().save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    rows = [
        {"image": PILImage.new("RGB", (28, 28), color), "questions": ["what is it ?"] * 3, "answers": ["yes"] * 3}
        for color in ("red", "blue", "green")
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")
    command = ["evaluation.py", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "test.parquet")]
    command += ["--images", "2", "--questions", "2", "--rounds", "1", "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", command)
    evaluation.main()
    report = json.loads((tmp_path / "a.json").read_text())
    [times] = report["results"]["new"]
    assert 0 < times["s"] < times["s_with_loading"] and 0 < times["cpu_s"] < times["cpu_s_with_loading"]
    assert report["answers"]["answers"] == 8 and report["answers"]["compared"] == 0
    older = {name: 3 * seconds for name, seconds in times.items()}
    assert "| old / new | 3.00 (3.00–3.00) |" in evaluation.table({"new": [times], "old": [older]})
    assert "| new |" in capsys.readouterr().out
