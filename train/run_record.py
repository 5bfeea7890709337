# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The record of a training run, `vtlmm_run.json`: settings, data, losses, versions and commit of every stage."""

import json
from pathlib import Path
from typing import Any

from datasets import IterableDataset

from vtlmm.data.environment import commit_of_code, gpu_name, package_versions
from vtlmm.data.output_files import write_json
from vtlmm.hub.repository import RUN_RECORD, read_run_record

from .stages import describe


PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "vtlmm")


def recorded(settings: dict[str, Any]) -> dict[str, Any]:
    """Return JSON-serializable settings without `*_token` values, which must not be published."""
    kept = {name: value for name, value in settings.items() if not name.endswith("_token")}
    return json.loads(json.dumps(kept, default=str))


def write_record(trainer, settings: dict[str, Any], metrics: dict[str, float], seconds: float) -> None:
    """
    Write the record of a finished stage next to its weights, after the entries of earlier stages.

    Args:
        trainer ([`VTLMMTrainer`])
        settings (`dict`): the settings of the stage.
        metrics (`dict`): of the last evaluation.
        seconds (`float`): duration of the training since its last start.
    """
    history = read_run_record(settings["model_name_or_path"])
    resumed_from = getattr(trainer, "resumed_from", None)
    history.append(
        {
            **run_entry(trainer, recorded(settings), metrics),
            "seconds": round(seconds, 1),
            # `seconds` of a resumed run covers the steps after this checkpoint only
            "resumed_from": Path(resumed_from).name if resumed_from else None,
            **({"vm_heads": trainer.vm_head_table} if trainer.vm_head_table else {}),
            "commit": commit_of_code(),
        }
    )
    write_json(Path(trainer.args.output_dir, RUN_RECORD), history)


def run_entry(trainer, settings: dict[str, Any], metrics: dict[str, float]) -> dict[str, Any]:
    """Return the entry of a stage so far: its settings, steps, rows, losses and versions."""
    return {
        "stage": trainer.stage.name,
        "plan": describe(trainer.model, trainer.stage).splitlines(),
        "settings": settings,
        "learning_rate": trainer.args.learning_rate,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "rows": None if isinstance(trainer.train_dataset, IterableDataset) else len(trainer.train_dataset),
        "processes": trainer.args.world_size,
        "device": gpu_name() or "cpu",
        "metrics": metrics,
        "curves": loss_curves(trainer.state.log_history),
        "versions": package_versions(PACKAGES),
    }


def loss_curves(log_history: list[dict[str, float]], num_points: int = 100) -> dict[str, list]:
    """Return the logged values of each loss as `[step, nats]`: at most `num_points`, evenly spaced, and the last."""
    curves = {}
    for name in ("lm_loss", "visual_loss", "eval_lm_loss", "eval_visual_loss"):
        points = [[entry["step"], float(f"{entry[name]:.5g}")] for entry in log_history if name in entry]
        curves[name] = points[:: -max(1, -(-len(points) // num_points))][::-1]
    return {name: points for name, points in curves.items() if points}
