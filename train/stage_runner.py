# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""One training run from its settings: load, check the data, train, save, and write down what was done."""

import gc
import json
import os
import subprocess
import time
import warnings
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import IterableDataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import find_adapter_config_file

from vtlmm.data.rows import ROW_FEATURES, DataConfig, load_rows
from vtlmm.data.validation import check_rows, checked_stream
from vtlmm.hub.quantize import quantization_config

from .adapters import keep_differentiable_on_cpu, peft_config
from .config import VTLMMTrainingConfig
from .recipe import ModelConfig, check_run, parse_settings, split_stages
from .stages import describe
from .trainer import VTLMMTrainer
from .vm_head_search import replace_vm_head


RUN_RECORD = "vtlmm_run.json"


def refuse_adapter(model_config: ModelConfig) -> None:
    """
    Raises:
        `ValueError`: where a run would begin with an adapter.
    """
    if find_adapter_config_file(model_config.model, revision=model_config.revision) is not None:
        raise ValueError(
            f"{model_config.model} is an adapter, and a stage begins with a whole model: `vtlmm merge "
            f"{model_config.model} --output FOLDER`, then set `model: FOLDER`."
        )


def prepare_dataset(data: DataConfig, split: str, processor, max_length: int | None):
    """Rows of one split, checked before anything is trained; a stream is checked row by row as it comes."""
    dataset = data.load_rows(split)
    if dataset is None or not data.check_data:
        return dataset
    if isinstance(dataset, IterableDataset):
        return checked_stream(dataset, processor, max_length, data.bad_rows)
    report, is_main_process = check_rows(dataset, processor, max_length), PartialState().is_main_process
    if is_main_process:
        print(report.format())
    good_rows = report.good_rows
    if data.bad_rows == "raise":
        report.raise_for_problems()
    if not good_rows:
        raise ValueError("No row is left to train on: every one of them is broken (see the report above).")
    if len(good_rows) < len(dataset) and is_main_process:
        warnings.warn(f"{len(dataset) - len(good_rows)} of {len(dataset)} rows are left out.", stacklevel=2)
    # the column `length` is what packing and grouping by length go by
    return dataset.add_column("length", report.lengths).select(good_rows)


def prepare_datasets(data: DataConfig, processor, args: VTLMMTrainingConfig) -> list:
    """Rows to train on and rows to evaluate on, by [`prepare_dataset`]; a stream is shuffled by `shuffle_dataset`."""
    train, evaluation = (prepare_dataset(data, split, processor, args.max_length) for split in ("train", "eval"))
    if args.shuffle_dataset and isinstance(train, IterableDataset):  # other rows are shuffled by the sampler
        # a buffer of files, not of decoded images
        train = train.decode(False).shuffle(seed=args.seed).cast(ROW_FEATURES)
    return [train, evaluation]


def load_task_rows(data: DataConfig):
    """The rows of `eval_task_data`."""
    if not Path(data.eval_task_data).exists():
        raise FileNotFoundError(f"{data.eval_task_data}: there is no such file (eval_task_data).")
    return load_rows(data.eval_task_data, image_folder=data.image_folder)


def build_trainer(settings: dict, datasets: list | None = None, **kwargs) -> VTLMMTrainer:
    r"""
    The trainer of a run; `kwargs` go to [`VTLMMTrainer`].

    Args:
        datasets (`list`, *optional*): what [`prepare_datasets`] gave for these settings, if it has run before.
    """
    model_config, data, adapter, args = parse_settings(settings)
    refuse_adapter(model_config)
    check_run(model_config, data, adapter, args)
    load = {"revision": model_config.revision, "trust_remote_code": args.trust_remote_code}
    processor = AutoProcessor.from_pretrained(model_config.model, **load)
    train_dataset, eval_dataset = datasets or prepare_datasets(data, processor, args)
    model = AutoModelForImageTextToText.from_pretrained(
        model_config.model,
        dtype=model_config.dtype,
        attn_implementation=model_config.attn_implementation,
        quantization_config=quantization_config(adapter.quantization, torch.bfloat16 if args.bf16 else torch.float32),
        **load,
    )
    change_model(model, model_config.use_pseudo_image_features, model_config.vm_head_type, args.seed)
    keep_differentiable_on_cpu(model)
    if data.eval_task_data is not None:
        kwargs |= {"eval_task_data": load_task_rows(data), "eval_task_images": data.eval_task_images}
    lora = peft_config(adapter, args.resolved_stage())
    # the base as PEFT writes it into the adapter's folder
    if adapter.base_id is not None:
        model.name_or_path = adapter.base_id
    elif lora is not None:
        lora.revision = model_config.revision
    return VTLMMTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=lora,
        **kwargs,
    )


def change_model(model, use_pseudo_image_features: bool | None, vm_head_type: str | None, seed: int) -> None:
    """What a run changes of the model that it begins with; an adapter's folder does not say it, its record does."""
    if use_pseudo_image_features is not None:
        model.config.use_pseudo_image_features = use_pseudo_image_features
    if vm_head_type is not None:
        replace_vm_head(model, vm_head_type, seed)


def run_training(settings: dict, **kwargs) -> VTLMMTrainer:
    """
    Trains one stage and saves a complete Hub-format folder in `output_dir`.

    `resume_from_checkpoint: true` goes on from the last checkpoint in `output_dir`, or begins if there is none, so the
    same command restarts a run that was killed.
    """
    trainer = build_trainer(settings, **kwargs)
    checkpoint = settings.get("resume_from_checkpoint")
    output_dir = Path(trainer.args.output_dir)
    if checkpoint is True:
        checkpoint = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
        print(f"Resuming from {checkpoint}" if checkpoint else "No checkpoint yet: starting from the beginning")
    if trainer.is_world_process_zero():  # of an earlier run: this one is not finished
        (output_dir / RUN_RECORD).unlink(missing_ok=True)
    started = time.time()
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()  # before the evaluation, whose faults must not cost the training
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_record(trainer, settings, metrics, time.time() - started)
    trainer.accelerator.wait_for_everyone()  # a next stage reads what the main process writes
    return trainer


def run_stages(settings: dict, **kwargs) -> None:
    """
    [`run_training`] for each of [`split_stages`]; with `resume_from_checkpoint` finished stages are passed over.

    The data of all stages are checked before the first learns, and once, where several stages have the same.

    Raises:
        `ValueError`: for a stage that was finished with other settings or before an earlier one, and for broken data
            of any stage.
    """
    runs = split_stages(settings)
    if "stages" in settings:
        runs = unfinished(runs)
    if not runs:
        return
    parsed = [parse_settings(run) for run in runs]
    first, _, _, args = parsed[0]
    refuse_adapter(first)
    for configs in parsed:
        check_run(*configs)
    # a later stage's model is not there yet; its processor is the first one's
    load = {"revision": first.revision, "trust_remote_code": args.trust_remote_code}
    processor, prepared, keys = AutoProcessor.from_pretrained(first.model, **load), {}, []
    for _, data, _, args in parsed:
        if data.eval_task_data is not None:
            load_task_rows(data)
        keys.append((astuple(data), args.max_length, args.shuffle_dataset, args.seed))
        if keys[-1] not in prepared:
            prepared[keys[-1]] = prepare_datasets(data, processor, args)
    for run, key in zip(runs, keys, strict=True):
        run_training(run, datasets=prepared[key], **kwargs)
        gc.collect()  # a trainer is full of cycles, and its model need not stay beside the next one's
        torch.cuda.empty_cache()


def unfinished(runs: list[dict]) -> list[dict]:
    """
    Those of a recipe's runs that are still to do.

    Raises:
        `ValueError`: when one of them stands before one that is finished, or has checkpoints to go on from.
    """
    finished = [is_finished(run) for run in runs]
    number = finished.index(False) if False in finished else len(runs)
    later = [run for run in runs[number + 1 :] if run.get("resume_from_checkpoint")]
    begun = [run for run in later if os.path.isdir(run["output_dir"]) and get_last_checkpoint(run["output_dir"])]
    if any(finished[number:]) or begun:
        raise ValueError(
            f"{runs[number]['output_dir']} is not finished, but a later stage was begun: with another model. Delete "
            "the folders of the stages after it."
        )
    return runs[number:]


def is_finished(run: dict) -> bool:
    """
    Whether a run that may resume has left its record.

    Raises:
        `ValueError`: when it was finished with other settings.
    """
    record = Path(run["output_dir"], RUN_RECORD)
    if not run.get("resume_from_checkpoint") or not record.is_file():
        return False
    done, wanted = json.loads(record.read_text(encoding="utf-8"))[-1]["settings"], recorded(run)
    names = {*done, *wanted} - {"resume_from_checkpoint"}
    differing = sorted(name for name in names if done.get(name) != wanted.get(name))
    if differing:
        raise ValueError(
            f"{run['output_dir']} was finished with other settings ({', '.join(differing)}): choose another "
            "`output_dir`, delete that folder and those of the stages after it, or set them back."
        )
    print(f"Stage {run['stage']} is finished: {record}")
    return True


def recorded(settings: dict) -> dict:
    """Settings as JSON says them, without tokens: a record is published."""
    kept = {name: value for name, value in settings.items() if not name.endswith("_token")}
    return json.loads(json.dumps(kept, default=str))


def write_record(trainer: VTLMMTrainer, settings: dict, metrics: dict, seconds: float) -> None:
    """Beside the weights: what this run did, after what earlier runs did to the same weights."""
    earlier = Path(settings["model"], RUN_RECORD)
    history = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else []
    packages = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "vtlmm")
    history.append(
        {
            "stage": trainer.stage.name,
            "plan": describe(trainer.model, trainer.stage).splitlines(),
            "settings": recorded(settings),
            "learning_rate": trainer.args.learning_rate,
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            "rows": None if isinstance(trainer.train_dataset, IterableDataset) else len(trainer.train_dataset),
            "processes": trainer.args.world_size,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "seconds": round(seconds, 1),
            "metrics": metrics,
            "curves": loss_curves(trainer.state.log_history),
            **({"vm_heads": trainer.vm_head_table} if trainer.vm_head_table else {}),
            "versions": {name: version(name) for name in packages},
            "commit": commit_of_code(),
        }
    )
    path = Path(trainer.args.output_dir, RUN_RECORD)
    path.write_text(json.dumps(history, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def loss_curves(log_history: list[dict], num_points: int = 100) -> dict[str, list]:
    """What was logged of each loss, `[step, nats]`; of more than `num_points` some, evenly, and the last."""
    curves = {}
    for name in ("lm_loss", "visual_loss", "eval_lm_loss", "eval_visual_loss"):
        points = [[entry["step"], float(f"{entry[name]:.5g}")] for entry in log_history if name in entry]
        curves[name] = points[:: -max(1, -(-len(points) // num_points))][::-1]
    return {name: points for name, points in curves.items() if points}


def commit_of_code() -> str | None:
    """The commit of the repository that this file is tracked in, `-dirty` with changes; None for an installed copy."""

    def git(*command):
        found = subprocess.run(["git", "-C", Path(__file__).parent, *command], capture_output=True, text=True)
        return found.stdout.strip() if found.returncode == 0 else None

    try:
        return git("describe", "--always", "--dirty") if git("ls-files", "--error-unmatch", "run.py") else None
    except FileNotFoundError:  # no git here
        return None
