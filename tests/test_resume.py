# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints, resuming, and runs that end early: signals, losses that are not finite, write errors."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from helpers.training import write_start

from vtlmm.cli.main import main
from vtlmm.train import checkpoints
from vtlmm.train.checkpoints import MANIFEST, STAGING, find_checkpoint, read_checkpoint
from vtlmm.train.interrupts import Interrupted
from vtlmm.train.stage_runner import build_trainer, run_training
from vtlmm.train.trainer import VTLMMTrainer


STEPS = {"stage": "joint", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The settings of a run of four steps, with checkpoints at 2 and 4, and its folder."""
    folder = tmp_path_factory.mktemp("resume")
    settings = {**write_start(folder), **STEPS, "output_dir": str(folder / "whole")}
    run_training(settings)
    return settings, folder / "whole"


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of the run as it was after step 2."""
    settings, whole = finished
    shutil.copytree(whole / "checkpoint-2", tmp_path / "out/checkpoint-2")
    return {**settings, "output_dir": str(tmp_path / "out"), "resume_from_checkpoint": True}, whole


def same_weights(one, other) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_checkpoint_lists_its_files(finished):
    _, whole = finished
    manifest = json.loads((whole / "checkpoint-2" / MANIFEST).read_text())
    names = {path.name for path in (whole / "checkpoint-2").iterdir()}
    assert set(manifest["files"]) == names - {MANIFEST} and not (whole / STAGING).exists()
    checkpoint, skipped = find_checkpoint(whole)
    assert checkpoint.path.name == "checkpoint-4" and skipped == []


def test_a_stopped_run_continues_to_the_same_weights(stopped, tmp_path, capsys):
    settings, whole = stopped
    (tmp_path / "out" / STAGING / "checkpoint-4").mkdir(parents=True)  # a save that was stopped
    run_training(settings)
    assert f"Resuming from {tmp_path}/out/checkpoint-2" in capsys.readouterr().out
    assert same_weights(tmp_path / "out", whole) and not (tmp_path / "out" / STAGING).exists()


def test_resuming_after_the_last_step_makes_no_step(finished, tmp_path):
    settings, whole = finished
    shutil.copytree(whole / "checkpoint-4", tmp_path / "out/checkpoint-4")
    trainer = run_training({**settings, "output_dir": str(tmp_path / "out"), "resume_from_checkpoint": True})
    assert trainer.state.global_step == 4 and same_weights(tmp_path / "out", whole)


def test_an_incomplete_checkpoint_is_skipped(stopped, finished, tmp_path, capsys):
    settings, whole = stopped
    shutil.copytree(whole / "checkpoint-4", tmp_path / "out/checkpoint-4")
    (tmp_path / "out/checkpoint-4/optimizer.pt").unlink()
    run_training(settings)
    text = capsys.readouterr().out
    assert "Skipped checkpoint-4: optimizer.pt is missing" in text and "checkpoint-2" in text
    assert same_weights(tmp_path / "out", whole)


@pytest.mark.parametrize(
    "text", ["[]", '{"files": [], "fingerprint": {}, "num_processes": 1}', "{", '{"files": {"a": 3}}']
)
def test_a_damaged_manifest_is_skipped(stopped, finished, tmp_path, capsys, text):
    settings, whole = stopped
    shutil.copytree(whole / "checkpoint-4", tmp_path / "out/checkpoint-4")
    (tmp_path / "out/checkpoint-4" / MANIFEST).write_text(text)
    checkpoint, [skipped] = find_checkpoint(tmp_path / "out")
    assert checkpoint.path.name == "checkpoint-2"
    assert skipped == f"checkpoint-4: {MANIFEST} is missing or damaged"


def test_a_named_checkpoint_must_be_complete(stopped, tmp_path):
    settings, _ = stopped
    (tmp_path / "out/checkpoint-2/rng_state.pth").unlink()
    with pytest.raises(ValueError, match="rng_state.pth is missing. Set `resume_from_checkpoint: true`"):
        run_training({**settings, "resume_from_checkpoint": str(tmp_path / "out/checkpoint-2")})
    with pytest.raises(ValueError, match="No checkpoint in .* is complete"):
        run_training(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-6}, "learning_rate: 0.01 → 1e-06"),
        ({"visual_loss_coef": 0.5}, "visual_loss_coef: None → 0.5"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size: 2 → 1"),
        ({"max_rows": 4}, "training data differs"),
        ({"use_pseudo_image_features": True}, "model.use_pseudo_image_features: False → True"),
        ({"dtype": "bfloat16"}, "start weights differs"),
    ],
)
def test_resuming_with_other_settings_is_refused(stopped, tmp_path, changes, message):
    settings, _ = stopped
    with pytest.raises(ValueError, match=message):
        run_training({**settings, **changes})
    assert not (tmp_path / "out/model.safetensors").exists()


def test_logging_and_saving_may_change(stopped, tmp_path):
    settings, whole = stopped
    run_training({**settings, "logging_steps": 3, "save_steps": 1, "save_total_limit": 1, "run_name": "again"})
    assert same_weights(tmp_path / "out", whole)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_checkpoint_without_optimizer_is_no_resume_point(finished, tmp_path):
    settings, _ = finished
    options = {"output_dir": str(tmp_path), "save_only_model": True, "max_steps": 2}
    build_trainer({**settings, **options}).train()
    with pytest.raises(ValueError, match="was saved without rng_state.pth"):
        read_checkpoint(tmp_path / "checkpoint-2")


# ---- Runs that end early ----


def test_a_loss_that_is_not_finite_ends_the_run(stopped, tmp_path, capsys, monkeypatch):
    settings, _ = stopped
    compute_loss = VTLMMTrainer.compute_loss
    monkeypatch.setattr(
        VTLMMTrainer, "compute_loss", lambda *args, **kwargs: compute_loss(*args, **kwargs) * torch.nan
    )
    argv = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert main(["train", *argv]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("vtlmm train: The loss is nan at step 3. The checkpoints so far are intact.")
    assert read_checkpoint(tmp_path / "out/checkpoint-2") and not (tmp_path / "out/checkpoint-4").exists()


def test_weights_that_are_not_finite_are_not_saved(finished, tmp_path):
    settings, _ = finished
    trainer = build_trainer({**settings, "output_dir": str(tmp_path)})
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(torch.inf)
    with pytest.raises(ValueError, match="is not finite after step 0, so nothing was saved"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), ".*No space left on device.* Free some disk space, then"),
        (PermissionError(13, "Permission denied"), ".*Permission denied.* Allow writing to this folder, then"),
        (OSError(30, "Read-only file system"), ".*Read-only file system.* Allow writing to this folder, then"),
    ],
)
def test_a_failed_write_leaves_earlier_checkpoints(stopped, tmp_path, monkeypatch, error, message):
    settings, _ = stopped

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoints, "write_manifest", fails)
    with pytest.raises(OSError, match=f"Could not write .*checkpoint-4: {message}"):
        run_training(settings)
    assert read_checkpoint(tmp_path / "out/checkpoint-2")
    assert not (tmp_path / "out/checkpoint-4").exists() and not (tmp_path / "out" / STAGING).exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint(finished, tmp_path, monkeypatch, number):
    settings, whole = finished
    training_step, steps = VTLMMTrainer.training_step, []

    def signaled(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 3:
            os.kill(os.getpid(), number)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(VTLMMTrainer, "training_step", signaled)
    started, handler = time.perf_counter(), signal.getsignal(number)
    with pytest.raises(Interrupted, match="Stopped at step 3 of 4. To continue, run the same command") as stopped:
        run_training({**settings, "output_dir": str(tmp_path)})
    assert stopped.value.exit_code == 128 + number and time.perf_counter() - started < 30
    assert find_checkpoint(tmp_path)[0].path.name == "checkpoint-3" and signal.getsignal(number) == handler
    monkeypatch.setattr(VTLMMTrainer, "training_step", training_step)
    run_training({**settings, "output_dir": str(tmp_path), "resume_from_checkpoint": True})
    assert same_weights(tmp_path, whole)
