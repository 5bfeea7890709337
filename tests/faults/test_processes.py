# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Two processes on one output, and signals to `vtlmm train`."""

import json
import os
import re
import signal
import time
from functools import partial

import pytest
from helpers.forked import arguments, fork, wait, wait_until
from helpers.training import write_start

from vtlmm.cli.main import main
from vtlmm.inference import resumable
from vtlmm.train.checkpoints import STAGING, checkpoint_folders, find_checkpoint


pytestmark = pytest.mark.slow

LONG = {"stage": "joint", "max_steps": 5000, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 2}


@pytest.fixture
def settings(tmp_path):
    return {**write_start(tmp_path), **LONG, "learning_rate": 1e-4, "output_dir": str(tmp_path / "out")}


def started(settings, tmp_path) -> int:
    """Start a long run and wait for its first checkpoint."""
    process = fork(partial(main, arguments(settings)), tmp_path / "log.txt")
    wait_until(lambda: checkpoint_folders(tmp_path / "out"), tmp_path / "log.txt")
    return process


def test_a_second_training_in_one_folder_is_refused(settings, tmp_path, capsys):
    process = started(settings, tmp_path)
    try:
        assert main(arguments({**settings, "resume_from_checkpoint": True})) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"Another process is writing to {tmp_path}/out (process {process} on" in error
        assert os.waitpid(process, os.WNOHANG) == (0, 0)  # the first run continues
    finally:
        os.kill(process, signal.SIGKILL)
    assert wait(process) == -signal.SIGKILL
    # the lock of a killed process is free
    step = max(int(path.name.partition("-")[2]) for path in checkpoint_folders(tmp_path / "out"))
    assert main(arguments({**settings, "resume_from_checkpoint": True, "max_steps": step + 1})) == 0


@pytest.mark.parametrize("command", ["ask", "eval"])
def test_a_second_writer_of_answers_is_refused(tmp_path, capsys, monkeypatch, command):
    write_start(tmp_path)
    (tmp_path / "q.json").write_text(json.dumps([{"question": "what", "answer": "red"}]))
    output = tmp_path / ("answers.jsonl" if command == "ask" else "results")
    lock = tmp_path / (".answers.jsonl.lock" if command == "ask" else "results/.vtlmm.lock")
    argv = [command, str(tmp_path / "start"), "--dataset", str(tmp_path / "q.json"), "--output", str(output)]

    def never_ends(*args, **kwargs):
        time.sleep(600)

    generate_batch = resumable.generate_batch
    monkeypatch.setattr(resumable, "generate_batch", never_ends)
    process = fork(partial(main, argv), tmp_path / "log.txt")
    monkeypatch.setattr(resumable, "generate_batch", generate_batch)
    try:
        wait_until(lambda: lock.is_file() and lock.read_text(), tmp_path / "log.txt")
        assert main(argv) == 1
        assert f"Another process is writing to {output} (process {process} on" in capsys.readouterr().err
    finally:
        os.kill(process, signal.SIGKILL)
    assert wait(process) == -signal.SIGKILL
    assert main([*argv, "--max-new-tokens", "512" if command == "ask" else "128"]) == 0  # the defaults: it resumes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_ends_the_command(settings, tmp_path, capsys, number):
    process, log = started(settings, tmp_path), tmp_path / "log.txt"
    begin = time.monotonic()
    os.kill(process, number)
    assert wait(process) == 128 + number and time.monotonic() - begin < 30
    text = log.read_text()
    step = int(re.search(r"vtlmm train: Stopped at step (\d+) of 5000\. To continue", text).group(1))
    assert f"`--resume_from_checkpoint true` (output: {tmp_path}/out)" in text and "Traceback" not in text
    checkpoint, skipped = find_checkpoint(tmp_path / "out")
    assert checkpoint.path.name == f"checkpoint-{step}" and skipped == []
    assert not (tmp_path / "out" / STAGING).exists()
    assert main(arguments({**settings, "resume_from_checkpoint": True, "max_steps": step + 1})) == 0
    assert f"Resuming from {checkpoint.path}" in capsys.readouterr().out
