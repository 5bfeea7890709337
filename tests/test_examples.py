# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The example scripts run at toy size."""

import runpy
import sys
from pathlib import Path

import pytest
from helpers.doc_snippets import ROOT, write_demo_outputs


EXAMPLES = sorted(ROOT.glob("examples/*.py"))
MODEL, IMAGE = "outputs/demo/model", "outputs/demo/image.png"
QUICK = ["--max_steps", "1", "--use_cpu", "true", "--report_to", "none", "--per_device_train_batch_size", "2"]
ARGUMENTS = {
    "ask.py": [MODEL, IMAGE, "what is it ?", "--max-new-tokens", "3"],
    "evaluate.py": [MODEL, "outputs/demo/held_out.parquet", "--limit", "2"],
    "push.py": [MODEL, "user/name", "--dry-run"],
    "train_joint.py": ["--model_name_or_path", MODEL, "--dataset_name", "rows.csv", "--output_dir", "joint", *QUICK],
    "train_four_stages.py": ["mobilenet_v2", "stories260k", "rows.csv", "own", "--max-steps", "1"],
    "visual_tokens.py": [MODEL, IMAGE, "--top-k", "2"],
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short_and_names_its_dependencies(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert text.startswith("# /// script\n# dependencies = [") and f"python examples/{path.name} " in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_example_runs(name, tmp_path, monkeypatch, request, capsys):
    write_demo_outputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ARGUMENTS[name]
    if name == "train_four_stages.py":
        shared = request.getfixturevalue("shared") / "weights"
        arguments = [str(shared / word) if (shared / word).exists() else word for word in arguments]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    if name.startswith("train"):
        output = Path("joint" if name == "train_joint.py" else "own/joint")
        assert (output / "model.safetensors").is_file()
    else:
        assert capsys.readouterr().out.strip()


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES} == set(ARGUMENTS)
