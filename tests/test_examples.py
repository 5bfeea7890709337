# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The example scripts run at toy size."""

import functools
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers.doc_snippets import ROOT, blocks, write_demo_outputs
from safetensors.torch import load_file

import vtlmm
from vtlmm.cli.main import main


EXAMPLES = sorted(ROOT.glob("examples/*.py"))
JOBS = sorted(ROOT.glob("examples/jobs/*.py"))
MODEL, IMAGE = "outputs/demo/model", "outputs/demo/image.png"
QUICK = ["--max_steps", "1", "--use_cpu", "true", "--report_to", "none", "--per_device_train_batch_size", "2"]
LORA = ["--model_name_or_path", MODEL, *QUICK, "--learning_rate", "0.01"]
# Enough short completions that some contain the answer and some do not: equal rewards have no gradient
SAMPLES = ["--num_generations", "8", "--per_device_train_batch_size", "8", "--max_completion_length", "6"]
ARGUMENTS = {
    "ask.py": [MODEL, IMAGE, "what is it ?", "--max-new-tokens", "3"],
    "dpo.py": [*LORA, "--dataset_name", "preferences", "--output_dir", "dpo"],
    "grpo.py": [*LORA, "--dataset_name", "preferences", "--output_dir", "grpo", *SAMPLES],
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


def write_preferences(folder: Path) -> None:
    """Write rows as docs/preference.md shows them, with the column `answer` of the GRPO example."""
    [row] = [json.loads(block) for block in blocks(ROOT / "docs/preference.md", "json")]
    folder.mkdir()
    rows = [{**row, "answer": word} for word in ("red", "boat", "red", "boat")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def check_adapter(folder: Path) -> None:
    """Check that the adapter is on the decoder alone, and that it can be merged."""
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert names and all("language_model" in name for name in names)
    assert main(["merge", str(folder), "--base", MODEL, "--output", "merged"]) == 0
    merged, base = (load_file(Path(name, "model.safetensors")) for name in ("merged", MODEL))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert all("language_model" in name for name in changed) and changed


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_example_runs(name, tmp_path, monkeypatch, request, capsys):
    write_demo_outputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ARGUMENTS[name]
    if name == "train_four_stages.py":
        shared = request.getfixturevalue("shared") / "weights"
        arguments = [str(shared / word) if (shared / word).exists() else word for word in arguments]
    if name in ("dpo.py", "grpo.py"):
        write_preferences(Path("preferences"))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    if name in ("dpo.py", "grpo.py"):
        check_adapter(Path(name.removesuffix(".py")))
    elif name.startswith("train"):
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
