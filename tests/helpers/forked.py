# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Run a function in a forked process, which does not import torch again."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer, TrainerCallback


def fork(function: Callable[[], int], log: Path) -> int:
    """Start a process that ends with the exit code of `function` and writes its output to `log`. Return its id."""
    process = os.fork()
    if process == 0:
        sys.stdout = sys.stderr = open(log, "a", buffering=1, encoding="utf-8")  # pytest replaced both
        os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
        code = 99
        try:
            code = function()
        finally:
            os._exit(code)
    return process


def wait(process: int, seconds: float = 180) -> int:
    """Return the exit code of a process, negative after a signal. Kill the process after `seconds`."""
    end = time.monotonic() + seconds
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise TimeoutError(f"the forked process did not end within {seconds} s")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def wait_until(condition: Callable[[], object], log: Path, seconds: float = 60) -> None:
    """Wait until `condition` is true. Fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.01)


class Kill(TrainerCallback):
    """Send SIGKILL to the own process after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_kill(build: Callable[[], Trainer], step: int, log: Path) -> int:
    """Build a trainer in a process that is killed after `step`, and train. Return the exit code."""

    def train() -> int:
        trainer = build()
        trainer.add_callback(Kill(step))
        trainer.train()
        return 0

    return wait(fork(train, log))


def arguments(settings: dict) -> list[str]:
    """Return the arguments of `vtlmm train`."""
    return ["train", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]
