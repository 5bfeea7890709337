# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Check combinations of settings. The dataclasses check only what one field can tell alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vtlmm.hub.quantize import quantization_config

from .output_folder import is_replaced


if TYPE_CHECKING:  # these modules import this one
    from .config import VTLMMTrainingConfig
    from .recipe import RunSettings
    from .stages import Stage


def validate(run: RunSettings) -> None:
    """
    Raise an error if settings of one run conflict. Nothing is loaded or written before this check.

    [`validate_arguments`] and [`validate_stage`] have checked `run.args` already.

    Raises:
        `ValueError`: for settings that conflict, and for a quantized decoder without bitsandbytes. The error names the
            settings and says which one to change.
    """
    _check_adapter(run)
    _check_vm_head(run)
    _check_evaluation(run)
    _check_streaming(run)
    _check_folders(run)


def validate_arguments(args: VTLMMTrainingConfig, stage: Stage) -> None:
    """
    Raise an error if training arguments conflict with each other, with their stage or with this machine.

    Raises:
        `ValueError`: names the settings and says which one to change.
    """
    if args.packing and args.max_length is None:
        raise ValueError("`packing` needs `max_length`, the length of a packed sequence.")
    if "paged" in args.optim and (args.use_cpu or not torch.cuda.is_available()):
        raise ValueError(
            f"`optim: {args.optim}` moves its state between GPU and CPU memory and needs CUDA. Set "
            "`optim: adamw_torch`."
        )
    if args.vm_head_candidates and stage.trains != ("vm_head",):
        raise ValueError("`vm_head_candidates` needs a stage that trains only the VM head: visual_head (III).")
    if stage.visual_target == "other_image" and args.per_device_train_batch_size < 2:
        raise ValueError(
            "`visual_target: other_image` takes the visual tokens of another image of the batch. Set "
            "`per_device_train_batch_size` to 2 or more."
        )
    if args.log_patch_words and args.vm_head_candidates:
        raise ValueError("`log_patch_words` shows one VM head, but `vm_head_candidates` trains several. Remove one.")
    if args.cache_image_features and "vision_tower" in stage.trains:
        raise ValueError("`cache_image_features` needs a frozen vision tower. Remove one of the two settings.")


def validate_stage(stage: Stage) -> None:
    """
    Raise an error if the losses of a stage do not reach a trainable module.

    Raises:
        `ValueError`: names the settings and says which one to change.
    """
    if stage.lm_loss_coef == 0 and stage.visual_loss_coef == 0:
        raise ValueError("`lm_loss_coef` and `visual_loss_coef` are both 0, so there is no loss.")
    if stage.visual_loss_coef > 0 and stage.visual_student is None:
        raise ValueError("A visual loss needs `visual_student`: 'lm_head' (stage IV) or 'vm_head' (stage III).")
    if stage.visual_target in ("feature", "basic") and stage.visual_student == "vm_head":
        raise ValueError(
            f"`visual_target: {stage.visual_target}` does not use the VM head. Set `visual_student: lm_head`."
        )
    if stage.visual_target == "basic" and stage.visual_loss_coef and "multi_modal_projector" not in stage.trains:
        raise ValueError(
            "`visual_target: basic` trains the projector, but it is frozen. Add multi_modal_projector to "
            "`trainable_modules`."
        )
    trained_by_vm_head_loss = {"vm_head", "multi_modal_projector", "vision_tower"}
    if stage.visual_student == "vm_head" and stage.visual_loss_coef and stage.detach_visual_teacher:
        if not trained_by_vm_head_loss & set(stage.trains):
            raise ValueError(
                "The visual loss trains the VM head, but it is frozen. Add vm_head to `trainable_modules`, or set "
                "`visual_student: lm_head`."
            )


def _check_adapter(run: RunSettings) -> None:
    adapter, args = run.adapter, run.args
    if adapter.load_in_4bit and adapter.load_in_8bit:
        raise ValueError("`load_in_4bit` and `load_in_8bit` exclude each other. Remove one.")
    if adapter.use_dora and not adapter.use_peft:
        raise ValueError("`use_dora` needs `use_peft: true`.")
    if adapter.base_id is not None and not adapter.use_peft:
        raise ValueError("`base_id` is recorded in an adapter. Remove it, or set `use_peft: true`.")
    if adapter.quantization != "none" and not adapter.use_peft:
        raise ValueError("A quantized decoder cannot be trained in full. Set `use_peft: true`.")
    if adapter.load_in_8bit and adapter.use_dora:
        # On a CPU, PEFT loses the scales of int8 weights when it computes DoRA's norms. GPUs were not tested.
        raise ValueError("DoRA does not work with `load_in_8bit`. Remove `use_dora`, or set `load_in_4bit`.")
    quantization_config(adapter.quantization, torch.float32)  # raises an error if bitsandbytes is missing
    mixed_precision = args.bf16 or args.fp16
    if adapter.use_peft and run.model.dtype != "float32" and not mixed_precision:
        raise ValueError(
            f"Adapters are trained in float32 and the base is in {run.model.dtype}, which needs mixed precision. Set "
            "`bf16: true`, or `dtype: float32`."
        )
    if not adapter.use_peft and run.model.dtype == "float16":
        raise ValueError(
            "Full training with `dtype: float16` loses small updates and overflows. Set `dtype: float32`, with "
            "`bf16: true` or `fp16: true` for mixed precision."
        )


def _check_vm_head(run: RunSettings) -> None:
    new_head = "vm_head_type" if run.model.vm_head_type else None
    if new_head is None and run.args.vm_head_init not in (None, "keep"):
        new_head = "vm_head_init"
    if run.adapter.use_peft and new_head and "vm_head" not in run.args.resolved_stage().trains:
        raise ValueError(
            f"`{new_head}` makes a new VM head, which an adapter of stage {run.args.stage} does not save. Remove the "
            "setting, or add vm_head to `trainable_modules`."
        )


def _check_evaluation(run: RunSettings) -> None:
    data, args = run.data, run.args
    strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
    needs_evaluation = {
        "eval_task_data": data.eval_task_data is not None,
        "eval_caption_data": data.eval_caption_data is not None,
        "vm_head_candidates": bool(args.vm_head_candidates),
        "eval_on_start": args.eval_on_start,
        f"eval_strategy: {strategy}": strategy != "no",
    }
    for name, is_set in needs_evaluation.items():
        if is_set and not data.has_evaluation_data():
            raise ValueError(f"`{name}` needs evaluation data. Set `eval_dataset` or `dataset_test_split`.")


def _check_streaming(run: RunSettings) -> None:
    data, args = run.data, run.args
    if not data.dataset_streaming:
        return
    by_length = "packing" if args.packing else args.train_sampling_strategy
    if by_length in ("packing", "group_by_length"):
        raise ValueError(f"`{by_length}` needs the lengths of all rows. Remove it, or set `dataset_streaming: false`.")
    if args.cache_image_features:
        raise ValueError(
            "`cache_image_features` needs all images before training. Remove it, or set `dataset_streaming: false`."
        )
    if args.max_steps <= 0:
        raise ValueError("A streamed dataset has no length. Set `max_steps`.")


def _check_folders(run: RunSettings) -> None:
    """An input of the run must not be its output: training would overwrite it."""
    output = os.path.realpath(run.args.output_dir or "trainer_output")
    inputs: list[tuple[str, Any]] = [
        ("model_name_or_path", run.model.model_name_or_path),
        ("eval_dataset", run.data.eval_dataset),
        ("eval_task_data", run.data.eval_task_data),
        ("eval_caption_data", run.data.eval_caption_data),
    ]
    for _, part, _ in run.data.parts("train"):
        inputs += [("dataset_name", part.dataset_name), ("image_folder", part.image_folder)]
    for name, value in inputs:
        if value is None or not os.path.exists(value):
            continue
        path = Path(os.path.realpath(value))
        if str(path) == output or (path.is_relative_to(output) and is_replaced(path.relative_to(output))):
            raise ValueError(
                f"`output_dir` {run.args.output_dir} is or contains the input `{name}` ({value}), which the run would "
                "replace. Choose another folder."
            )
