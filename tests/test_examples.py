# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The example scripts run at toy size."""

import functools
import json
import runpy
import sys
from pathlib import Path

import pytest
from helpers.doc_snippets import ROOT, write_demo_outputs

import vtlmm


EXAMPLES = sorted(ROOT.glob("examples/*.py"))
JOBS = sorted(ROOT.glob("examples/jobs/*.py"))
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


@pytest.mark.parametrize("path", [*EXAMPLES, *JOBS], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_example_is_short_and_names_its_dependencies(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert text.startswith("# /// script\n# dependencies = [") and f" {path.relative_to(ROOT)} " in text


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


@pytest.mark.slow
def test_job_trains_and_pushes(tmp_path, monkeypatch, capsys):
    write_demo_outputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vtlmm, "push_model", functools.partial(vtlmm.push_model, dry_run=True), raising=False)
    settings = ["max_steps=1", "use_cpu=true", "per_device_train_batch_size=2", "bf16=false"]
    options = ["--stage", "joint", "--output-repo", "user/joint", "--license", "mit"]
    options += [word for setting in settings for word in ("--setting", setting)]
    monkeypatch.setattr(sys, "argv", ["train.py", MODEL, "rows.csv", *options])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "examples/jobs/train.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "Dry run: nothing was pushed to user/joint." in printed
    assert Path("outputs/job/model.safetensors").is_file() and "model.safetensors" in printed
    assert json.loads(Path("outputs/job/vtlmm_run.json").read_text())[-1]["stage"] == "joint"
