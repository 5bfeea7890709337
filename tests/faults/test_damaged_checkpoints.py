# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Delete or truncate each file of a checkpoint in turn: resuming falls back to an older one, or refuses."""

import shutil

import pytest
from helpers.training import write_start

from vtlmm.train.stage_runner import build_trainer, run_training


pytestmark = pytest.mark.slow

STEPS = {"stage": "joint", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


def damage(path, how: str) -> None:
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_damaged_checkpoint_never_gives_other_weights(tmp_path, capsys, kind):
    adapter = {"use_peft": True, "lora_r": 2} if kind == "lora" else {}
    settings = {**write_start(tmp_path), **STEPS, **adapter, "output_dir": str(tmp_path / "run")}
    build_trainer(settings).train()
    run, kept = tmp_path / "run", tmp_path / "kept"
    shutil.copytree(run, kept)
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    final = (run / "checkpoint-4" / name).read_bytes()
    files = sorted(path.name for path in (kept / "checkpoint-4").iterdir() if path.is_file())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", name} <= set(files)
    for i, file in enumerate(files):
        shutil.rmtree(run)
        shutil.copytree(kept, run)
        damage(run / "checkpoint-4" / file, ("delete", "truncate", "change")[i % 3])
        run_training({**settings, "resume_from_checkpoint": True})
        text = capsys.readouterr().out
        assert "Skipped checkpoint-4" in text and f"Resuming from {run}/checkpoint-2" in text, file
        assert (run / name).read_bytes() == final, file
    shutil.rmtree(run)
    shutil.copytree(kept, run)
    for step in (2, 4):
        damage(run / f"checkpoint-{step}" / "optimizer.pt", "delete")
    with pytest.raises(ValueError, match="No checkpoint in .* is complete"):
        run_training({**settings, "resume_from_checkpoint": True})
