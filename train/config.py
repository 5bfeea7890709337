# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Training arguments: those of TRL's SFTConfig, and the settings of one VT-LMM stage."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig

from vtlmm.data.setting_values import require_integers, require_numbers

from .dataset_config import MAX_LENGTH
from .setting_checks import validate_arguments
from .stages import Stage, resolve_stage
from .vm_head_search import check_candidates


# Smallest value: integer settings
INTEGERS = {
    1: ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length"),
    0: ("dataloader_num_workers", "seed", "data_seed", "log_patch_words"),
}
NOT_NEGATIVE = (
    *("learning_rate", "projector_learning_rate", "adapter_learning_rate", "num_train_epochs"),
    *("warmup_steps", "weight_decay", "max_grad_norm"),
)
NO_LOGITS = "Evaluation computes losses only and never builds logits."
ANSWERS_ONLY = "The language loss covers the assistant's answers, or the completion."
# Settings of SFTConfig and TrainingArguments that would have no effect or another meaning:
# name: (supported values, reason and fix). A test checks that every setting is either here or known to work.
LIMITED_SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "assistant_only_loss": ((True,), ANSWERS_ONLY),
    "completion_only_loss": ((None, True), ANSWERS_ONLY),
    "label_smoothing_factor": ((0.0,), "The losses of a stage are not smoothed."),
    "loss_type": (("nll",), "`stage`, `lm_loss_coef` and `visual_loss_coef` define the loss."),
    "average_tokens_across_devices": ((True,), "The losses are always means over the tokens of all processes."),
    "router_aux_loss_coef": ((None, 0.0), "The balance loss of a mixture of experts is not computed; set it to 0."),
    "packing_strategy": (("bfd",), "Rows are packed whole, by best-fit decreasing."),
    "eval_packing": ((None, False), "Evaluation rows are not packed; the losses are the same."),
    "padding_free": ((False,), "Set `packing` to avoid padding."),
    "truncation_mode": (("keep_start",), "Rows are never truncated; `max_length` rejects longer rows."),
    "dataset_text_field": (("text",), "Pass rows with `messages`, or `prompt` and `completion`."),
    "dataset_kwargs": ((None, {}), "Rows are always prepared; `skip_prepare_dataset` is not available."),
    "dataset_num_proc": ((None,), "Convert the rows with `load_rows` before the training."),
    "eos_token": ((None,), "Set it on the processor's tokenizer and in its chat template."),
    "pad_token": ((None,), "Set it on the processor's tokenizer."),
    "chat_template_path": ((None,), "Set `processor.chat_template`, with generation marks around the answers."),
    "use_liger_kernel": ((False,), "Liger has no kernels for this model; the losses are fused already."),
    "liger_kernel_config": ((None,), "Liger has no kernels for this model; the losses are fused already."),
    "train_sampling_strategy": (("random", "sequential", "group_by_length"), "Choose one of these."),
    "length_column_name": (("length",), "The trainer adds the column `length`."),
    "label_names": ((None,), NO_LOGITS),
    "include_for_metrics": (([],), NO_LOGITS),
    "batch_eval_metrics": ((False,), NO_LOGITS),
    "eval_do_concat_batches": ((True,), NO_LOGITS),
    "eval_use_gather_object": ((False,), NO_LOGITS),
    "eval_accumulation_steps": ((None,), NO_LOGITS),
    "fp16_full_eval": ((False,), "The weights would stay in float16 after an evaluation."),
    "bf16_full_eval": ((False,), "The weights would stay in bfloat16 after an evaluation."),
    "parallelism_config": ((None,), "The losses need whole sequences; use DDP, FSDP2 or DeepSpeed ZeRO."),
}


@dataclass
class VTLMMTrainingConfig(SFTConfig):
    r"""
    Configuration of a [`VTLMMTrainer`]: every setting of TRL's [`SFTConfig`], and the settings of one VT-LMM stage.

    Parameters:
        stage (`str`, *optional*, defaults to `"joint"`):
            `"projector"` (I), `"decoder"` (II), `"visual_head"` (III) or `"joint"` (IV): a row of `STAGES`.
        trainable_modules (`list[str]`, *optional*):
            Trainable modules. Overrides the stage's value.
        lm_loss_coef, visual_loss_coef (`float`, *optional*):
            Weights of the two losses. Override the stage's values. `visual_loss_coef=0` in stage IV is the baseline
            for the claim of the paper.
        visual_student (`str`, *optional*):
            Head that the visual loss trains, `"vm_head"` or `"lm_head"`. Overrides the stage's value.
        detach_visual_teacher (`bool`, *optional*, defaults to `True`):
            Whether the teacher of the visual loss gets no gradient.
        visual_target (`str`, *optional*, defaults to `"next_patch"`):
            Target of the visual loss: the paper's `"next_patch"`, or an alternative from `visual_targets.py`:
            `"same_patch"`, `"other_image"`, `"feature"` or `"basic"`.
        vm_head_init (`str`, *optional*):
            Initial weights of the VM head: `"lm_head"`, `"input_embeddings"`, `"random"`, or `"keep"` for those of the
            checkpoint. Defaults to `"lm_head"` in stage III, because stage II changes the LM head, else to `"keep"`.
        vm_head_candidates (`list[dict]`, *optional*):
            VM heads that stage III trains side by side and independently of each other. Each has `vm_head_type`,
            `vm_head_init` and `learning_rate`. The trainer keeps the best one on `eval_dataset`; `loss` is their sum.
        projector_learning_rate (`float`, *optional*):
            Learning rate of the projector. Defaults to `learning_rate`.
        adapter_learning_rate (`float`, *optional*):
            Learning rate of the LoRA weights. Defaults to `learning_rate`. LLaVA-1.5 uses 2e-4 next to 2e-5.
        cache_image_features (`str` or `bool`, *optional*):
            Folder for the features that the frozen vision tower computes for each image. `True` is `image_features`
            next to `output_dir`, which later stages find too. Each image is then decoded and encoded once, for all
            epochs and runs. All machines must see the folder. One image takes num_patches · vision_feature_size
            numbers, which is 1.2 MB with CLIP-L/336 in bfloat16.
        log_patch_words (`int`, *optional*, defaults to 0):
            Number of images of `eval_dataset` whose patch words are drawn at every evaluation. The PNG files are in
            `patch_words` in `output_dir`, and in the trackers of `report_to`: TensorBoard, W&B and Trackio.

    > Defaults that differ from TRL's: `learning_rate` (the stage's), `lr_scheduler_type` (cosine), `warmup_steps` (3 %
    > of the steps), `max_length` (2048; longer rows are rejected, not truncated), `bf16` (if the GPU supports it),
    > `assistant_only_loss` (`True`), `remove_unused_columns` (`False`), `hub_strategy` (`"end"`). `LIMITED_SETTINGS`
    > lists the settings of TRL that accept some values only.

    Raises:
        `ValueError`: if a setting is not supported, or settings contradict each other or the stage.
    """

    learning_rate: float | None = field(  # type: ignore[assignment]  # None until the stage is known
        default=None, metadata={"help": "Initial learning rate. Defaults to the stage's."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps; below 1, a fraction of all steps."})
    max_length: int | None = field(
        default=MAX_LENGTH, metadata={"help": "Maximum tokens of a row; longer rows are errors."}
    )
    assistant_only_loss: bool = field(default=True, metadata={"help": "Train on answers only. Must be true."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that are not used."})
    # A push during training would publish checkpoints, with a pickle of the settings.
    hub_strategy: str = field(default="end", metadata={"help": "When `push_to_hub` pushes."})

    stage: str = field(default="joint", metadata={"help": "projector, decoder, visual_head or joint (I to IV)."})
    trainable_modules: list[str] | None = field(
        default=None, metadata={"help": "Trainable modules. Defaults to the stage's."}
    )
    lm_loss_coef: float | None = field(default=None, metadata={"help": "Weight of L_lm. Defaults to the stage's."})
    visual_loss_coef: float | None = field(default=None, metadata={"help": "Weight of L_vm. Defaults to the stage's."})
    visual_student: str | None = field(
        default=None, metadata={"help": "Head that L_vm trains: vm_head or lm_head. Defaults to the stage's."}
    )
    detach_visual_teacher: bool = field(default=True, metadata={"help": "Stop gradients into the teacher of L_vm."})
    visual_target: str = field(
        default="next_patch", metadata={"help": "next_patch, same_patch, other_image, feature or basic."}
    )
    vm_head_init: str | None = field(
        default=None,
        metadata={"help": "lm_head, input_embeddings, random or keep. Defaults to lm_head in stage III, else keep."},
    )
    vm_head_candidates: list[dict] | None = field(
        default=None,
        metadata={"help": "VM heads that stage III trains side by side; the best one on eval_dataset is kept."},
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector. Defaults to learning_rate."}
    )
    adapter_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the LoRA weights. Defaults to learning_rate."}
    )
    cache_image_features: str | None = field(
        default=None, metadata={"help": "Folder for image features; true: next to output_dir."}
    )
    log_patch_words: int = field(
        default=0, metadata={"help": "Images whose patch words go to the trackers at every evaluation; 0: none."}
    )

    def __post_init__(self):
        self._check_limited_settings()
        self._check_numbers()
        if self.vm_head_init not in (None, "lm_head", "input_embeddings", "random", "keep"):
            raise ValueError(
                f"`vm_head_init` is {self.vm_head_init!r}; it must be lm_head, input_embeddings, random or keep."
            )
        if self.vm_head_candidates:
            check_candidates(self.vm_head_candidates)
        stage = self.resolved_stage()
        if self.learning_rate is None:
            self.learning_rate = stage.learning_rate
        if self.vm_head_init is None:
            self.vm_head_init = "lm_head" if self.stage == "visual_head" else "keep"
        if self.cache_image_features is True:
            self.cache_image_features = str(Path(self.output_dir or "trainer_output").parent / "image_features")
        if self.bf16 is None and not self.fp16:
            # TRL would enable bf16 everywhere, and fail on a machine without a GPU.
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not self.use_cpu
        validate_arguments(self, stage)
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch would warn at each stage
        with warnings.catch_warnings():
            # SFTConfig sets this by default, so the warning would be about a setting that the user did not choose.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
            super().__post_init__()
        if self.accelerator_config.dispatch_batches or self.accelerator_config.split_batches:
            raise ValueError(
                "`dispatch_batches` and `split_batches` are not supported: they split a batch by rows, and its images "
                "are not one per row. Remove them from `accelerator_config`."
            )
        # By default, accelerate would slice the images of a stream's batch to the number of rows.
        self.accelerator_config.dispatch_batches = False

    def _check_limited_settings(self) -> None:
        for name, (supported, reason) in LIMITED_SETTINGS.items():
            value = getattr(self, name, supported[0])  # TrainingArguments gains and loses fields
            if value not in supported:
                values = " or ".join(repr(one) for one in supported)
                raise ValueError(f"`{name}={value!r}` is not supported; it must be {values}. {reason}")

    def _check_numbers(self) -> None:
        for minimum, names in INTEGERS.items():
            require_integers(minimum, **{name: getattr(self, name) for name in names})
        require_numbers(**{name: getattr(self, name) for name in NOT_NEGATIVE})

    def resolved_stage(self) -> Stage:
        """Return the stage's row of `STAGES` with the overrides of this run."""
        return resolve_stage(
            self.stage,
            self.trainable_modules,
            self.lm_loss_coef,
            self.visual_loss_coef,
            self.visual_student,
            self.detach_visual_teacher,
            self.visual_target,
        )
