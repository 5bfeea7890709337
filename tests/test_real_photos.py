# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`make real` at toy size: the rows of its splits, its stages, its table, and resuming."""

import importlib.util
import sys
from pathlib import Path

import pytest
from helpers.composition import tower_folder  # noqa: F401 - a fixture
from helpers.photo_parts import parts  # noqa: F401 - a fixture

from vtlmm.data.rows import load_rows


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_photos.py"


@pytest.mark.slow
def test_the_script_runs_and_resumes(parts, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("real_photos", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "HELD_OUT_PHOTOS", 12)
    output = tmp_path / "out"
    command = [str(SCRIPT), str(parts), str(parts / "decoder"), str(output), "--max-steps"]
    monkeypatch.setattr(sys, "argv", [*command, "0"])
    script.main()
    assert (output / "results.md").read_text().count("\n| ") == 2  # the header and the aligned model

    assert (output / "texts.txt").read_text() == "what is it ? a red square\n"
    names = ("train", "words", "matching")
    splits = {name: load_rows(str(output / f"{name}.parquet")) for name in names}
    assert [len(rows) for rows in splits.values()] == [40 + 5 * 36, 5 * 12, 12]
    images = {name: {image.tobytes() for [image] in rows["images"]} for name, rows in splits.items()}
    assert not images["train"] & images["words"] | images["train"] & images["matching"]
    assert not images["words"] & images["matching"]

    monkeypatch.setattr(sys, "argv", [*command, "2"])
    script.main()
    table = (output / "results.md").read_text()
    models = ["aligned, not trained", "aligned: decoder", "aligned: joint"]
    models += [f"paper: {stage}" for stage in ("projector", "decoder", "visual_head", "joint")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:9]] == models
    words = [line.split(" | ")[1] for line in table.splitlines()[2:5]]
    assert words[0] == words[1] == words[2]  # a frozen projector keeps the words
    assert float(words[0].split()[0]) > 80
    capsys.readouterr()
    monkeypatch.setattr(script, "measure_caption_words", None)  # everything is measured already
    script.main()
    assert "Every stage is finished" in capsys.readouterr().out
    assert (output / "results.md").read_text() == table
    monkeypatch.setattr(sys, "argv", [*command, "3"])
    with pytest.raises(ValueError, match="has the options .*'max_steps': 2"):
        script.main()
