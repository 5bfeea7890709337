# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Show the words of the patches of some images at every evaluation, as a PNG file and in the run's trackers."""

import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from vtlmm.analysis.visual_tokens import read_visual_tokens
from vtlmm.data.images import image_key, open_image
from vtlmm.hub.repository import PATCH_WORDS_FOLDER


if TYPE_CHECKING:
    from .config import VTLMMTrainingConfig

TRACKER_KEY = "eval/patch_words"
MAX_ROWS = 1000  # of the evaluation rows, in which images are searched


class PatchWordImages(TrainerCallback):
    r"""
    Write `patch_words/step_000100.png` into the output folder at every evaluation, and log it to TensorBoard, W&B and
    Trackio if the run reports to them. No random number is drawn, so the training does not change.

    Args:
        trainer ([`~transformers.Trainer`]): its model is read.
        processor ([`VTLMMProcessor`])
        images (`list[PIL.Image.Image]`): Images to show.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """

    def __init__(self, trainer: Trainer, processor: Any, images: list[Image.Image]):
        from vtlmm.analysis.plots import save_patch_words

        self.trainer, self.processor, self.images = trainer, processor, images
        self.save_patch_words = save_patch_words

    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir, PATCH_WORDS_FOLDER, f"step_{state.global_step:06d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        model = self.trainer.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a PeftModel
        training = model.training
        with self.trainer.accelerator.autocast():
            tokens = read_visual_tokens(base, self.processor, self.images)
        model.train(training)
        titles = [
            f"mean entropy {image_tokens.mean_entropy:.2f} of {image_tokens.max_entropy:.2f} nats"
            for image_tokens in tokens
        ]
        caption = f"Words of the VM head after {state.global_step} steps."
        self.save_patch_words(path, self.processor, self.images, tokens, titles, caption)
        log_image(self.trainer, path, state.global_step, caption)


def log_image(trainer: Trainer, path: Path, step: int, caption: str) -> None:
    """Log a PNG file to the trackers that the run reports to, at an optimizer step."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            callback.tb_writer.add_image(TRACKER_KEY, pixels, step, dataformats="HWC")
    for name in ("wandb", "trackio"):
        tracker = sys.modules.get(name)  # the tracker's own callback has imported it and started its run
        if name in (trainer.args.report_to or []) and tracker is not None:
            tracker.log({TRACKER_KEY: tracker.Image(str(path), caption=caption), "train/global_step": step})


def add_patch_word_images(trainer: Trainer, processor: Any, eval_datasets: list) -> None:
    r"""
    Add [`PatchWordImages`] to a trainer with the first images of its evaluation rows, if `log_patch_words` is set.

    Args:
        eval_datasets (`list`): evaluation rows of the trainer; the first dataset is used, and it may be `None`.

    Raises:
        `ValueError`: without evaluation rows that have images, and with FSDP or DeepSpeed.
    """
    number = cast("VTLMMTrainingConfig", trainer.args).log_patch_words
    if not number:
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("`log_patch_words` is not supported with FSDP or DeepSpeed. Set it to 0.")
    rows = next(iter(eval_datasets), None)
    images: dict[str, Image.Image] = {}
    for row in islice(() if rows is None else rows, MAX_ROWS):
        images.update((image_key(image), open_image(image)) for image in row["images"])
        if len(images) >= number:
            break
    if not images:
        raise ValueError("`log_patch_words` shows images of `eval_dataset`, but it has none. Set it to 0.")
    trainer.add_callback(PatchWordImages(trainer, processor, list(images.values())[:number]))
