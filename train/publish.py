# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What a trainer publishes: the model card of its run so far, and uploads of complete repositories without pickles."""

import shutil
import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from vtlmm.data.output_files import write_json
from vtlmm.hub.model_card import write_card
from vtlmm.hub.push import copy_to_staging, upload_published_files
from vtlmm.hub.repository import ADAPTER, ADAPTER_SETTINGS, CARD_FILE, RUN_RECORD, VTLMM, read_run_record

from .run_record import run_entry


UPLOADING = ".uploading"  # folder in the output folder
SETTINGS = (
    *("lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "num_train_epochs"),
    *("max_steps", "max_length", "bf16", "seed"),
)


def write_run_card(
    trainer: Any,
    folder: Path,
    name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
    license: str | None = None,
) -> None:
    r"""
    Write the model card of a run into `folder`, unless a card written by hand is there.

    Args:
        trainer ([`VTLMMTrainer`])
        name (`str`, *optional*): name of the repository; by default the trainer's `hub_model_id`, or the folder's
            name.
        dataset_name, tags, license (*optional*): see [`~transformers.Trainer.create_model_card`].
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = trainer.model
    if isinstance(model, PeftModel):
        kind, config = ADAPTER, {**model.active_peft_config.to_dict(), "base_model_name_or_path": base_name(model)}
    else:
        kind, config = VTLMM, model.config.to_dict()
    finished = (folder / RUN_RECORD).is_file()
    write_card(
        folder,
        trainer.args.hub_model_id or getattr(trainer, "hub_model_id", None) or name or folder.name,
        license=license,
        datasets=[dataset_name] if dataset_name else [],
        tags=[tags] if isinstance(tags, str) else tags or [],
        runs=None if finished else [*_earlier_runs(model.name_or_path), run_so_far(trainer)],
        kind_and_config=(kind, config),
    )


def _earlier_runs(name: str | None) -> list[dict[str, Any]]:
    """Return the record of the model that a run started from. A damaged record must not stop a save."""
    try:
        return read_run_record(name) if name else []
    except ValueError as error:
        warnings.warn(f"The model card leaves out the earlier stages: {error}", stacklevel=2)
        return []


def write_adapter_files(trainer: Any, folder: Path, name: str) -> None:
    """
    Write next to an adapter what PEFT does not save: its changes of the base's config, and a card of the run.

    A checkpoint gets no card.
    """
    config = trainer.model.config
    settings = {key: getattr(config, key) for key in ("use_pseudo_image_features", "vm_head_type")}
    write_json(folder / ADAPTER_SETTINGS, settings)
    if trainer._staging:
        (folder / CARD_FILE).unlink(missing_ok=True)  # PEFT's card names the local folder of the base
    else:
        write_run_card(trainer, folder, name)


def base_name(model: PeftModel) -> str | None:
    """Return the name of an adapter's base model."""
    config = model.active_peft_config
    return config.base_model_name_or_path or getattr(model, "name_or_path", None)


def run_so_far(trainer: Any) -> dict[str, Any]:
    """Return an entry for the training record, from the trainer's settings and logs."""
    args = trainer.args
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings = {name: getattr(value, "value", value) for name, value in settings.items()}
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    losses: dict[str, float] = {}
    for entry in trainer.state.log_history:
        losses |= {name: value for name, value in entry.items() if name in ("eval_lm_loss", "eval_visual_loss")}
    return run_entry(trainer, {"batch_size": batch_size, **settings}, losses)


def push_checkpoint(trainer: Any, checkpoint: Path) -> None:
    """
    Upload a checkpoint during training, for every `hub_strategy` but `"end"`.

    The root of the repository becomes the model of the checkpoint. `"checkpoint"` and `"all_checkpoints"` also keep it
    in a separate folder. Optimizer states are pickles and stay on this machine.
    """
    args = trainer.args
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    running = trainer.push_in_progress
    if running is not None and not running.is_done() and not args.hub_always_push:
        return
    # A copy with links, because the checkpoint must not change, and may be deleted before the upload ends.
    staging = Path(args.output_dir, UPLOADING, checkpoint.name)
    shutil.rmtree(staging, ignore_errors=True)
    copy_to_staging(checkpoint, staging)
    write_run_card(trainer, staging)
    folders = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
    job: Any = upload_published_files(
        staging,
        trainer.hub_model_id,
        follow_links=True,
        also_in=folders.get(args.hub_strategy),
        commit_message=f"Training in progress, step {trainer.state.global_step}",
        revision=args.hub_revision,
        token=args.hub_token,
        run_as_future=True,
    )
    job.add_done_callback(lambda _: shutil.rmtree(staging, ignore_errors=True))
    if running is None or running.is_done():
        trainer.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]  # the annotation is wrong
    else:
        running.jobs.append(job)


def push_trained_model(
    trainer: Any,
    commit_message: str = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **card: Any,
) -> Any:
    """Save the trainer's model with its card and upload it; see [`~transformers.Trainer.push_to_hub`]."""
    token = token or trainer.args.hub_token
    if trainer.hub_model_id is None:
        trainer.init_hf_repo(token=token, private=private)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    trainer.create_model_card(**card)
    trainer._finish_current_push()
    return upload_published_files(
        trainer.args.output_dir,
        trainer.hub_model_id,
        commit_message=commit_message,
        revision=revision or trainer.args.hub_revision,
        token=token,
        run_as_future=not blocking,
    )
