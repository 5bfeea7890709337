# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Split the settings of a recipe with several stages into the settings of each stage."""

from pathlib import Path
from typing import Any


STAGE_KEYS = ("model_name_or_path", "output_dir", "stage")


def split_stages(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Return the settings of each run of a recipe, in order.

    With `stages`, each stage starts from the model of the stage before it and writes to its own folder in
    `output_dir`. A stage with an adapter is merged before the next one, which then starts from its folder `merged`.
    Without `stages`, the settings are those of one run.

    Raises:
        `ValueError`: if a setting is missing, or if it conflicts with `stages`.
    """
    if "stages" not in settings:
        return [settings]
    shared = {key: value for key, value in settings.items() if key != "stages"}
    for key in ("model_name_or_path", "output_dir"):
        if key not in shared:
            raise ValueError(f"A recipe with `stages` needs `{key}`.")
    for key in ("vm_head_type", "vm_head_init"):
        if key in shared:
            raise ValueError(
                f"`{key}` would replace the VM head in every stage. Set it for one stage: stages.visual_head.{key}."
            )
    runs: list[dict[str, Any]] = []
    model = shared["model_name_or_path"]
    for stage, stage_settings in settings["stages"].items():
        reserved_keys = [f"stages.{stage}.{key}" for key in STAGE_KEYS if key in stage_settings]
        reserved_keys += ["stage"] * ("stage" in shared)
        if reserved_keys:
            raise ValueError(f"A recipe with `stages` sets {', '.join(reserved_keys)} itself. Remove this setting.")
        output_dir = str(Path(shared["output_dir"], stage))
        run = {**shared, **stage_settings, "stage": stage, "model_name_or_path": model, "output_dir": output_dir}
        if runs:
            run.pop("model_revision", None)  # the revision of the first stage's model
        runs.append(run)
        model = str(merged_folder(run) if run.get("use_peft") else output_dir)
    return runs


def merged_folder(run: dict[str, Any]) -> Path:
    """Return the folder for the whole model of a stage that trains an adapter."""
    return Path(run.get("output_dir") or "trainer_output", "merged")
