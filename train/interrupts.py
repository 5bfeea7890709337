# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Stop a training run on SIGINT or SIGTERM after its current step, with a checkpoint."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback


STEP_SECONDS = 20  # a step that takes longer after the signal is given up
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """
    A run was stopped by a signal. The text says what was saved and how to resume.

    Attributes:
        exit_code (`int`): 128 plus the number of the signal, as shells report it.
    """

    def __init__(self, text: str, number: int):
        super().__init__(text)
        self.exit_code = 128 + number


class _StopCallback(TrainerCallback):
    """Saves and stops at the end of a step after a signal. All ranks agree on the step."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.received: int | None = None

    def on_step_end(self, args, state, control, **kwargs):
        number = self.received or 0
        if args.world_size > 1:
            flag = torch.tensor([number], device=args.device)
            number = int(self.trainer.accelerator.reduce(flag, reduction="sum").item()) and (number or signal.SIGTERM)
        if number:
            signal.setitimer(signal.ITIMER_REAL, 0)  # saving may take its time
            self.received = number
            control.should_save = control.should_training_stop = True
        return control


@contextmanager
def stop_at_step_end(trainer: Any) -> Iterator[None]:
    """
    Handle SIGINT and SIGTERM while a trainer runs: finish the step, save a checkpoint, raise [`Interrupted`].

    A second signal, or a step that takes longer than `STEP_SECONDS`, stops the run without a new checkpoint. Signals
    can be handled in the main thread only, and not on Windows; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    callback, owner = _StopCallback(trainer), os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a data loading process: its parent stops it
            return
        if callback.received is not None or number == signal.SIGALRM:
            signal.setitimer(signal.ITIMER_REAL, 0)
            first = callback.received or number
            raise Interrupted(f"Stopped without a new checkpoint. {resume_hint(trainer.args.output_dir)}", first)
        callback.received = number
        signal.setitimer(signal.ITIMER_REAL, STEP_SECONDS)
        print("\nStopping after this step. Send the signal again to stop now.", flush=True)

    before = {number: signal.signal(number, handle) for number in (*SIGNALS, signal.SIGALRM)}
    trainer.add_callback(callback)
    try:
        yield
        if callback.received is not None:
            step = trainer.state.global_step
            hint = resume_hint(trainer.args.output_dir)
            raise Interrupted(f"Stopped at step {step} of {trainer.state.max_steps}. {hint}", callback.received)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        trainer.remove_callback(callback)
        for number, handler in before.items():
            signal.signal(number, handler)


def resume_hint(output_dir: str) -> str:
    """Return how to continue a run."""
    return f"To continue, run the same command with `--resume_from_checkpoint true` (output: {output_dir})."
