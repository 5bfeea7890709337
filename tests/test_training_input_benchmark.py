# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`benchmarks/training_input.py` at toy size."""

import json
import sys
from pathlib import Path

import pytest
from helpers.training import write_start


@pytest.mark.slow
def test_input_and_step_are_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import training_input

    write_start(tmp_path)
    command = ["training_input.py", "--model", str(tmp_path / "start"), "--rounds", "2", "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(tmp_path / "a.json")])
    training_input.main()
    seconds = json.loads((tmp_path / "a.json").read_text())["seconds_per_row"]
    assert {label: len(values) for label, values in seconds.items()} == {"decode": 2, "input": 2, "step": 2}
    assert all(a < b for a, b in zip(seconds["decode"], seconds["input"], strict=True))
    assert capsys.readouterr().out.count("\n| ") == 4
