# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Failures of the machine during a run: a full disk and a killed data process end it with one error."""

import os
import resource
import signal
import time

import pytest
from helpers.training import write_start
from torch.utils.data import get_worker_info

from vtlmm.cli.main import main
from vtlmm.train.checkpoints import STAGING, find_checkpoint
from vtlmm.train.collator import VTLMMCollator
from vtlmm.train.stage_runner import run_training


pytestmark = pytest.mark.slow

STEPS = {"stage": "joint", "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}


@pytest.fixture
def settings(tmp_path):
    return {**write_start(tmp_path), **STEPS, "output_dir": str(tmp_path / "out")}


def train(settings) -> int:
    return main(["train", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))])


@pytest.fixture
def small_files():
    """A function that limits the size of new files, which fails like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_earlier_checkpoints(settings, tmp_path, capsys, small_files, file):
    run_training({**settings, "max_steps": 1})
    (tmp_path / "out/vtlmm_run.json").unlink()
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out/checkpoint-1").iterdir()}
    small_files(min(size for size in sizes.values() if size >= sizes[file]) - 100)
    capsys.readouterr()
    code = train({**settings, "max_steps": 2, "resume_from_checkpoint": True})
    error = capsys.readouterr().err.strip().splitlines()[-1]
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert code == 1 and "checkpoint-2" in error and "Earlier checkpoints are intact" in error
    checkpoint, skipped = find_checkpoint(tmp_path / "out")
    assert checkpoint.path.name == "checkpoint-1" and skipped == [] and not (tmp_path / "out" / STAGING).exists()
    assert train({**settings, "max_steps": 2, "resume_from_checkpoint": True}) == 0


def test_a_killed_data_process_ends_the_run(settings, tmp_path, capsys, monkeypatch):
    encode, calls = VTLMMCollator.__call__, []

    def killed(self, rows):
        calls.append(rows)
        if get_worker_info() is not None and len(calls) == 3:
            while not (tmp_path / "out/checkpoint-1").is_dir():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, rows)

    monkeypatch.setattr(VTLMMCollator, "__call__", killed)
    options = {"max_steps": 6, "dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}
    assert train({**settings, **options}) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "A data loading process ended unexpectedly" in error and "Checkpoints are intact" in error
    checkpoint, _ = find_checkpoint(tmp_path / "out")
    assert checkpoint is not None
    monkeypatch.setattr(VTLMMCollator, "__call__", encode)
    assert train({**settings, **options, "resume_from_checkpoint": True}) == 0
