# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are complete or invisible, and resuming from the newest complete one."""

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, rotate_checkpoints

from vtlmm.data.json_files import read_json

from .fingerprint import differences, run_fingerprint
from .interrupts import stop_at_step_end
from .output_folder import TRAINER_STATE, lock_output


MANIFEST = "vtlmm_checkpoint.json"
STAGING = ".saving"  # a checkpoint is written in this folder of the output, and renamed when it is complete


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that was verified against its manifest."""

    path: Path
    fingerprint: dict[str, Any]


# ---- The manifest ----


def write_manifest(folder: Path, fingerprint: dict[str, Any], num_processes: int) -> None:
    """Write the sizes and SHA-256 of all files of a checkpoint. The manifest is the last file of a checkpoint."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"fingerprint": fingerprint, "num_processes": num_processes, "files": files}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(folder: Path) -> Checkpoint:
    """
    Return a checkpoint, verified: all its files exist and are unchanged, and it has everything to resume from.

    Raises:
        `ValueError`: naming the first file that is missing or changed.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    try:
        manifest = read_json(folder / MANIFEST, entries={"files": dict, "fingerprint": dict, "num_processes": int})
        files, fingerprint, ranks = manifest["files"], manifest["fingerprint"], manifest["num_processes"]
        sizes = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is missing or damaged") from error
    rng_files = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    for name in (TRAINER_STATE, *rng_files):
        if name not in files:
            raise ValueError(f"it was saved without {name} (`save_only_model`?)")
    if not any(re.search(r"^optimizer|zero_pp_rank|optim_states", name) for name in files):
        raise ValueError("it was saved without the state of the optimizer (`save_only_model`?)")
    for name, (size, digest) in sizes.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != size or _sha256(path) != digest:
            raise ValueError(f"{name} is damaged")
    return Checkpoint(folder, fingerprint)


def find_checkpoint(output_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """
    Return the newest complete checkpoint of a run, and why newer ones were skipped.

    Raises:
        `ValueError`: if there are checkpoints, but none is complete.
    """
    skipped: list[str] = []
    folders = sorted(checkpoint_folders(output_dir), key=_step, reverse=True)
    for folder in folders:
        try:
            return read_checkpoint(folder), skipped
        except ValueError as error:
            skipped.append(f"{folder.name}: {error}")
    if folders:
        raise ValueError(
            f"No checkpoint in {output_dir} is complete ({'; '.join(skipped)}). Set `overwrite: true` to train again, "
            f"or start a new run from the weights of one: `model_name_or_path: {folders[0]}`."
        )
    return None, skipped


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, complete or not."""
    return [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and _step(path) >= 0]


def _step(folder: Path) -> int:
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)
    return int(match.group(1)) if match else -1


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_write_error(error: Exception) -> bool:
    """Return whether writing failed. torch and safetensors raise their own errors for a full disk."""
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        return True
    return isinstance(error, RuntimeError) and bool(
        re.search(r"StreamWriter|inline_container|iostream error", str(error))
    )


# ---- The trainer's part ----


class SafeCheckpoints(Trainer):
    """
    Saving and resuming for a [`~transformers.Trainer`], as a base class next to it.

    - A checkpoint is written to a temporary folder, listed in a manifest and renamed, so that it is complete or
      invisible. Older checkpoints are deleted after that.
    - Resuming takes the newest complete checkpoint and refuses one of a run with other settings, data or start
      weights.
    - One process writes to an output folder. A loss or a weight that is not finite ends the run. SIGINT and SIGTERM
      save a checkpoint first.
    """

    _staging = False
    _fingerprint: dict[str, Any] | None = None
    resumed_from: str | None = None

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train as in the base class. `resume_from_checkpoint=True` takes the newest complete checkpoint, if any."""
        if self._fingerprint is None:  # before the first step: it covers the start weights
            self._fingerprint = run_fingerprint(self)
        with lock_output(self.args.output_dir):
            checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
            self.resumed_from = checkpoint
            with stop_at_step_end(self):
                output = super().train(checkpoint, *args, **kwargs)
        if self.args.save_strategy != SaveStrategy.NO:
            self.create_model_card()  # once, since its plot takes longer than a checkpoint of a small model
        return output

    def _checkpoint_to_resume(self, resume: str | bool | None) -> str | None:
        """The checkpoint to resume from. The main process decides for all."""
        choice: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                choice = [None, self._choose_checkpoint(resume)]
            except ValueError as error:
                choice = [str(error), None]
        if self.args.world_size > 1:
            broadcast_object_list(choice)
        if choice[0] is not None:
            raise ValueError(choice[0])
        return choice[1]

    def _choose_checkpoint(self, resume: str | bool | None) -> str | None:
        output_dir = Path(str(self.args.output_dir))
        shutil.rmtree(output_dir / STAGING, ignore_errors=True)
        if not resume:
            return None
        if resume is True:
            checkpoint, skipped = find_checkpoint(output_dir)
            for reason in skipped:
                print(f"Skipped {reason}")
            if checkpoint is None:
                print(f"{output_dir} has no checkpoint yet: training starts from the beginning.")
                return None
        else:
            try:
                checkpoint = read_checkpoint(Path(resume))
            except ValueError as error:
                raise ValueError(
                    f"Cannot resume from {resume}: {error}. Set `resume_from_checkpoint: true` to take the newest "
                    f"complete checkpoint, or start a new run from its weights: `model_name_or_path: {resume}`."
                ) from error
        other = differences(checkpoint.fingerprint, self._fingerprint or {})
        if other:
            raise ValueError(
                f"{checkpoint.path} is of a run with other settings: {'; '.join(other)}. Restore them, or choose "
                "another `output_dir`."
            )
        if checkpoint.path.parent.resolve() == Path(output_dir).resolve():
            for folder in checkpoint_folders(output_dir):  # newer ones are incomplete, or the user goes back
                if _step(folder) > _step(checkpoint.path):
                    print(f"Deleting {folder}, which is newer than the checkpoint to resume from")
                    shutil.rmtree(folder)
        print(f"Resuming from {checkpoint.path}")
        return str(checkpoint.path)

    def _run_epoch(self, *args, **kwargs):
        """As in the base class, which would make one more step after a checkpoint of the last step."""
        if self.state.global_step >= self.state.max_steps > 0:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        """As in the base class. A loss that is not finite ends the run before it reaches the weights."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss).all():
            raise ValueError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}. The checkpoints so far are intact. "
                "Use a lower `learning_rate`, more `warmup_steps`, or `max_grad_norm: 1.0`."
            )
        return loss

    # ---- Saving ----

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self._staging:  # an upload reads the files later, when the folder has its final name
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint under a temporary name, add its manifest and rename it; then delete old ones."""
        output_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = output_dir / STAGING / name, output_dir / name
        self._check_weights()
        if self.is_world_process_zero():
            shutil.rmtree(output_dir / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every rank has written its files
            if self.state.best_global_step:
                best_name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                self.state.best_model_checkpoint = str(output_dir / best_name)
            if self.args.should_save:
                self._finish_checkpoint(staged, final)
        except Exception as error:
            shutil.rmtree(output_dir / STAGING, ignore_errors=True)
            if not _is_write_error(error):
                raise
            advice = "Free some disk space"
            if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
                advice = "Allow writing to this folder"
            raise OSError(
                f"Could not write {final}: {str(error).splitlines()[0]}. Earlier checkpoints are intact. {advice}, "
                "then run the same command with `--resume_from_checkpoint true`."
            ) from error
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(output_dir), self.args.save_total_limit, best, use_mtime=False)

    def _finish_checkpoint(self, staged: Path, final: Path) -> None:
        """Complete the files of a checkpoint and give the folder its name."""
        self.state.save_to_json(str(staged / TRAINER_STATE))
        write_manifest(staged, self._fingerprint or {}, self.args.world_size)
        if final.exists():
            shutil.rmtree(final)
        os.replace(staged, final)
        staged.parent.rmdir()

    def _check_weights(self) -> None:
        """Refuse to save weights that are not finite, which would replace the last good checkpoint."""
        for name, parameter in cast(nn.Module, self.model).named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise ValueError(
                    f"{name} is not finite after step {self.state.global_step}, so nothing was saved. The checkpoints "
                    "so far are intact. Use a lower `learning_rate`."
                )
