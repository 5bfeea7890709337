# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Run training stages from their settings: check, load, train, save, and record what was done."""

import gc
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForImageTextToText

from vtlmm.hub.quantize import quantization_config
from vtlmm.hub.repository import CHECK_FILE, RUN_RECORD, read_run_record

from .adapters import keep_differentiable_on_cpu, peft_config
from .caption_callback import CaptionWordsCallback
from .checkpoints import checkpoint_folders
from .cost import format_costs
from .dataset_checks import load_processor
from .fingerprint import is_harmless
from .output_folder import check_output, clear_output, lock_output, remove_scores
from .recipe import RunSettings, parse_settings
from .run_data import prepare_datasets, prepare_stages, print_once
from .run_record import recorded, write_record
from .setting_checks import validate
from .stage_settings import merged_folder, split_stages
from .stages import next_stage
from .start_model import check_start, first_stage
from .trainer import VTLMMTrainer
from .vm_head_search import replace_vm_head


# ---- One stage ----


def build_trainer(settings: dict[str, Any], datasets: list | None = None, **kwargs) -> VTLMMTrainer:
    r"""
    Load the model and the data of one stage and return its trainer.

    Args:
        settings (`dict`): settings of one stage; see `settings_table`.
        datasets (`list`, *optional*): the result of [`prepare_datasets`] for these settings.
        kwargs: further arguments of [`VTLMMTrainer`].
    """
    run = parse_settings(settings)
    validate(run)
    check_start(run.model)
    args, name = run.args, run.model.model_name_or_path
    load: dict[str, Any] = {"revision": run.model.model_revision, "trust_remote_code": args.trust_remote_code}
    processor, max_positions = load_processor(name, **load)
    if datasets is None:
        datasets = prepare_datasets(run.data, processor, args, max_positions)
    train_dataset, eval_dataset = datasets
    compute_dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(
        name,
        dtype=run.model.dtype,
        attn_implementation=run.model.attn_implementation,
        quantization_config=quantization_config(run.adapter.quantization, compute_dtype),
        **load,
    )
    change_model(model, run.model.use_pseudo_image_features, run.model.vm_head_type, args.seed)
    keep_differentiable_on_cpu(model)
    captions = run.data.load_eval_file("eval_caption_data")
    if (task_rows := run.data.load_eval_file("eval_task_data")) is not None:
        kwargs |= {"eval_task_data": task_rows, "eval_task_images": run.data.eval_task_images}
    lora = peft_config(run.adapter, args.resolved_stage())
    # PEFT writes the name of the base into the adapter's configuration
    if run.adapter.base_id is not None:
        model.name_or_path = run.adapter.base_id
    elif lora is not None:
        lora.revision = run.model.model_revision
    trainer = VTLMMTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=lora,
        **kwargs,
    )
    if captions is not None:
        trainer.add_callback(CaptionWordsCallback(trainer, captions))
    return trainer


def change_model(model, use_pseudo_image_features: bool | None, vm_head_type: str | None, seed: int) -> None:
    """Apply the settings that change the model itself. An adapter's folder has them in `vtlmm_adapter.json`."""
    if use_pseudo_image_features is not None:
        model.config.use_pseudo_image_features = use_pseudo_image_features
    if vm_head_type is not None:
        replace_vm_head(model, vm_head_type, seed)


def run_training(settings: dict[str, Any], **kwargs) -> VTLMMTrainer:
    """
    Train one stage, save the model in `output_dir` and return the trainer.

    With `resume_from_checkpoint: true`, training continues from the newest complete checkpoint in `output_dir`, or
    starts from the beginning without one. So the same command restarts a run that was stopped.

    Raises:
        `ValueError`: for settings that conflict, an output folder that holds a model, and a checkpoint of a run with
            other settings, data or start weights.
        [`Interrupted`]: after SIGINT or SIGTERM, when a checkpoint is saved.
    """
    output_dir = Path(settings.get("output_dir") or "trainer_output")
    overwrite, resume = bool(settings.get("overwrite")), settings.get("resume_from_checkpoint")
    check_output(output_dir, overwrite, resume)
    trainer = build_trainer(settings, **kwargs)
    started = time.time()
    with lock_output(output_dir):
        if trainer.is_world_process_zero():
            if overwrite:
                clear_output(output_dir)
            (output_dir / RUN_RECORD).unlink(missing_ok=True)  # a record means that the stage is finished
            (output_dir / CHECK_FILE).unlink(missing_ok=True)  # its logits are of the weights before this run
            shutil.rmtree(output_dir / "merged", ignore_errors=True)  # it holds the weights of an earlier run
            remove_scores(output_dir)
        trainer.accelerator.wait_for_everyone()
        try:
            trainer.train(resume_from_checkpoint=resume)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise OSError(
                f"A data loading process ended unexpectedly ({str(error).splitlines()[0]}). Checkpoints are intact. "
                "It is often out of memory: use fewer `dataloader_num_workers`, then resume."
            ) from error
        trainer.save_model()  # save first: an evaluation failure must not lose the weights
        metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
        trainer.save_state()
        if trainer.is_world_process_zero():
            write_record(trainer, settings, metrics, time.time() - started)
        trainer.accelerator.wait_for_everyone()  # the next stage reads what the main process writes
    return trainer


# ---- Several stages ----


def train_stages(settings: dict[str, Any]) -> Path:
    """
    Train the stage or the stages of a recipe and return the folder of the final model.

    All stages are checked before the first one trains: settings, output folders, rows and images. With
    `resume_from_checkpoint`, finished stages are skipped.

    Args:
        settings (`dict`): what [`parse_arguments`] or [`read_recipe`] returns.

    Raises:
        `ValueError`: for settings that conflict, broken data, and outputs that exist.
    """
    if "stages" not in settings and settings.get("stage") is None:
        raise ValueError(first_stage(settings))
    runs = split_stages(settings)
    parsed = [parse_settings(run) for run in runs]
    for run in parsed:
        validate(run)
    folders = [Path(run.args.output_dir or "trainer_output") for run in parsed]
    for run, folder in zip(parsed, folders, strict=True):
        check_output(folder, run.output.overwrite, run.args.resume_from_checkpoint)
    number = first_unfinished(runs)
    if number == len(runs):
        print_once(f"Every stage is finished. The model is in {folders[-1]}.")
        return folders[-1]
    if number and runs[number - 1].get("use_peft"):
        merge_stage(runs[number - 1])
    check_start(parsed[number].model)
    with ExitStack() as locks:
        for folder in folders[number:]:
            locks.enter_context(lock_output(folder))
        prepared = prepare_stages(parsed[number:])
        print_once(format_costs(parsed[number:], prepared))
        for i in range(number, len(runs)):
            print_once(f"\nStage {i + 1} of {len(runs)}: {runs[i].get('stage')}")
            trainer = run_training(runs[i], datasets=prepared[i - number])
            steps = trainer.state.global_step
            del trainer
            gc.collect()  # trainers hold reference cycles; free this model before the next one is loaded
            torch.cuda.empty_cache()
            print_once(f"Stage {runs[i].get('stage')} is finished after {steps} steps: {folders[i]}")
            if runs[i].get("use_peft") and i + 1 < len(runs):
                merge_stage(runs[i])
    print_once(next_steps(parsed[-1], folders[-1]))
    return folders[-1]


def merge_stage(run: dict[str, Any]) -> None:
    """Merge the adapter of a finished stage into a whole model, from which the next stage starts."""
    from .merge import merge_adapter  # imports this module

    output = merged_folder(run)
    if PartialState().is_main_process and not output.is_dir():
        draft = output.with_name(".merging")
        base = run["model_name_or_path"] if os.path.isdir(run["model_name_or_path"]) else None
        merge_adapter(run["output_dir"], draft, base=base, dtype=run.get("dtype", "float32"), overwrite=True)
        os.replace(draft, output)
        print_once(f"Merged the adapter of stage {run['stage']}: {output}")
    PartialState().wait_for_everyone()


def next_steps(run: RunSettings, folder: Path) -> str:
    """Return where the model is and what to do next."""
    lines = [f"\nThe model is in {folder}."]
    if run.adapter.use_peft:
        lines.append(f"  merge the adapter:  vtlmm merge {folder} --output {folder}-merged")
    elif following := next_stage(run.args.stage):
        lines.append(f"  train the next stage:  vtlmm train --model_name_or_path {folder} --stage {following} …")
    lines.append(f"  ask it a question:  vtlmm ask {folder} IMAGE QUESTION")
    return "\n".join(lines)


# ---- What is finished ----


def first_unfinished(runs: list[dict[str, Any]]) -> int:
    """
    Return the index of the first run that is not finished.

    Raises:
        `ValueError`: if a later run is finished or has checkpoints. It started from another model.
    """
    finished = [is_finished(run) for run in runs]
    number = finished.index(False) if False in finished else len(runs)
    later = [run for run in runs[number + 1 :] if run.get("resume_from_checkpoint")]
    begun = [run for run in later if checkpoint_folders(Path(run["output_dir"]))]
    if any(finished[number:]) or begun:
        raise ValueError(
            f"{runs[number]['output_dir']} is not finished, but a later stage has started from another model. Delete "
            "the folders of the later stages."
        )
    return number


def is_finished(run: dict[str, Any]) -> bool:
    """
    Return whether a run that may resume has its record and the same total number of steps.

    Raises:
        `ValueError`: if the run was finished with other settings.
    """
    history = read_run_record(run.get("output_dir") or "trainer_output")
    if not run.get("resume_from_checkpoint") or not history:
        return False
    done, wanted = history[-1]["settings"], recorded(run)
    differing = sorted(name for name in {*done, *wanted} if done.get(name) != wanted.get(name))
    if any(name in ("max_steps", "num_train_epochs") for name in differing):
        return False
    differing = [name for name in differing if not is_harmless(name)]
    if differing:
        changes = "; ".join(f"{name}: {done.get(name)} → {wanted.get(name)}" for name in differing)
        raise ValueError(
            f"{run['output_dir']} was finished with other settings ({changes}). Restore them, choose another "
            "`output_dir`, or delete this folder and those of the later stages."
        )
    print_once(f"Stage {run['stage']} is finished: {run['output_dir']}")
    return True
