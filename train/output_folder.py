# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Protect the output folder of a training run: one writer, and no existing model is overwritten."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from vtlmm.data.output_files import one_writer
from vtlmm.hub.paths import MODEL_FILES
from vtlmm.hub.paths import clear_output as remove_model_files


LOCK_FILE = ".vtlmm.lock"
TRAINER_STATE = "trainer_state.json"


@contextmanager
def lock_output(folder: str | Path) -> Iterator[None]:
    """
    Hold the lock of an output folder, so that one process (or one group of ranks) writes to it at a time.

    Raises:
        `ValueError`: if another process holds the lock.
    """
    if not PartialState().is_main_process:
        yield
        return
    path = Path(folder, LOCK_FILE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"`output_dir` {folder} is a file. Choose a folder.") from error
    with one_writer(path, folder):  # the trainer and the stage runner share one lock
        yield


def check_output(folder: str | Path, overwrite: bool, resume: bool | str | None) -> None:
    """
    Refuse an output folder that holds a model, unless the run resumes it or overwrites it.

    Raises:
        `ValueError`: if the folder holds a model or checkpoints, or if both `overwrite` and
            `resume_from_checkpoint` are set.
    """
    problem: list[str | None] = [None]
    if PartialState().is_main_process:
        problem = [_output_problem(Path(folder), overwrite, resume)]
    if PartialState().num_processes > 1:
        broadcast_object_list(problem)
    if problem[0] is not None:
        raise ValueError(problem[0])


def _output_problem(folder: Path, overwrite: bool, resume: bool | str | None) -> str | None:
    if overwrite and resume:
        return "`overwrite` and `resume_from_checkpoint` exclude each other. Remove one."
    if overwrite or resume or not holds_model(folder):
        return None
    return (
        f"{folder} already holds a model or checkpoints. Set `resume_from_checkpoint: true` to continue that run, "
        "`overwrite: true` to replace it, or choose another `output_dir`."
    )


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model, checkpoints or the record of a run."""
    return any(any(folder.glob(pattern)) for pattern in (*MODEL_FILES, "checkpoint-*"))


def is_replaced(path: Path) -> bool:
    """Return whether a run deletes or replaces a path, which is relative to its output folder."""
    top = path.parts[0]
    if len(path.parts) == 1 and any(path.match(pattern) for pattern in (*MODEL_FILES, TRAINER_STATE)):
        return True
    return top in ("merged", "results", ".eval_results") or top.startswith("checkpoint-")


def clear_output(folder: Path) -> None:
    """Delete the model, the checkpoints, the scores and the record of an earlier run. Other files stay."""
    remove_model_files(folder)
    (folder / TRAINER_STATE).unlink(missing_ok=True)
    remove_scores(folder)
    for path in [*folder.glob("checkpoint-*"), folder / "merged"]:
        shutil.rmtree(path, ignore_errors=True)


def remove_scores(folder: Path) -> None:
    """Delete the scores that a push of earlier weights left in a folder. The next model card would show them."""
    for path in [*folder.glob("results/*.json"), *folder.glob(".eval_results/*.yaml")]:
        path.unlink()
