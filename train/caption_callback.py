# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure the words of visual tokens at each evaluation of a training."""

from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback

from vtlmm.analysis.caption_words import measure_caption_words
from vtlmm.analysis.captions import captioned_images
from vtlmm.data.validation import check_rows

from .trainer import VTLMMTrainer


class CaptionWordsCallback(TrainerCallback):
    r"""
    Log at each evaluation whether visual tokens name what captioned images show, see [`measure_caption_words`].

    The metrics are shares in 0 to 1: `eval_image_word`, the most likely word of an image is in its captions;
    `eval_patch_word`, the same for the word of a patch; `eval_image_word_shuffled` and `eval_patch_word_shuffled`,
    the same with the captions of other images. The callback draws no random number. With several processes, each
    measures all images.

    Args:
        trainer ([`VTLMMTrainer`]): trainer that the callback is added to.
        rows ([`~datasets.Dataset`]): rows of [`load_rows`] with one image each, which are not in the training data.
            The answers are the captions.

    Raises:
        `ValueError`: for invalid rows, fewer than two captioned images, and with FSDP or DeepSpeed.

    Example:

    ```python
    trainer.add_callback(CaptionWordsCallback(trainer, load_rows("captions.json")))
    ```
    """

    def __init__(self, trainer: VTLMMTrainer, rows: Dataset):
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError("`eval_caption_data` is not supported with FSDP or DeepSpeed. Remove it.")
        processor = trainer.processing_class
        check_rows(rows, processor, require_marks=False).raise_for_problems(advice="Fix these rows of captions.")
        if (number := len(captioned_images(rows))) < 2:
            raise ValueError(f"`eval_caption_data` has {number} captioned images with content words. Add rows.")
        self.trainer, self.rows = trainer, rows

    def on_evaluate(self, args, state, control, **kwargs):
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        was_training = model.training
        model.eval()
        with self.trainer.accelerator.autocast():  # the trained modules can have another dtype than the tower
            words = measure_caption_words(
                model, self.trainer.processing_class, self.rows, batch_size=args.per_device_eval_batch_size
            )
        model.train(was_training)
        scores = {
            "eval_image_word": words.top_word.value,
            "eval_image_word_shuffled": words.top_word_shuffled.value,
            "eval_patch_word": words.patch_word.value,
            "eval_patch_word_shuffled": words.patch_word_shuffled.value,
        }
        self.trainer.log(scores)
        kwargs["metrics"].update(scores)  # for `metric_for_best_model` and the run record
