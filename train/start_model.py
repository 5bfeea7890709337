# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Check the model that a run starts from, and tell which stage to begin with."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import find_adapter_config_file

from vtlmm.data.json_files import read_json
from vtlmm.hub.paths import check_checkpoint
from vtlmm.hub.repository import read_run_record
from vtlmm.hub.repository_checks import require_json

from .recipe import ModelConfig
from .stages import STAGES, next_stage


def check_start(model: ModelConfig) -> None:
    """
    Check that a run can start from a model, before anything is loaded.

    Raises:
        `FileNotFoundError`, `NotADirectoryError`: for a folder that does not exist, and for a file.
        `ValueError`: for a folder without a model, the folder of a whole training instead of one of its stages, an
            adapter, and a model that is not a VT-LMM.
    """
    name = check_checkpoint(model.model_name_or_path)
    folder = Path(name)
    if find_adapter_config_file(name, revision=model.model_revision) is not None:
        raise ValueError(
            f"{name} is an adapter, but a stage starts from a whole model. Merge it first: `vtlmm merge {name} "
            "--output FOLDER`, then set `model_name_or_path: FOLDER`."
        )
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        inside = [stage for stage in STAGES if stage in inside] or inside
        hint = f" It is the folder of a training. Choose one of its models, e.g. {folder / inside[-1]}." * bool(inside)
        raise ValueError(f"{name} does not hold a model: config.json is missing.{hint}")
    require_json(folder)
    read_run_record(folder)  # the record of this run is appended to it
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "vtlmm":
        raise ValueError(
            f"{name} is a {kind!r} model, not a VT-LMM. Make one with `vtlmm compose` or `vtlmm convert`."
        )


def first_stage(settings: dict[str, Any]) -> str:
    """Return the error for a run without a stage: it names the stage to begin with, as far as the model tells."""
    names = list(STAGES)
    listed = f"The stages are, in order, {', '.join(names)}"
    name = settings.get("model_name_or_path")
    folder = Path(str(name))
    if not name or not folder.is_dir():
        return f"`stage` is not set. {listed}. A new model begins with `--stage projector`."
    history = read_run_record(folder)
    if history:
        last = history[-1].get("stage")
        following = (next_stage(last) or last) if last in names else names[0]
        return f"`stage` is not set. The last stage of {name} was {last}: continue with `--stage {following}`."
    if projector_is_untrained(folder):
        return f"`stage` is not set. The projector of {name} is not trained: begin with `--stage projector`. {listed}."
    return (
        f"`stage` is not set. {listed}. A model converted from LLaVA-1.5 has finished the first two: continue with "
        "`--stage visual_head`."
    )


def projector_is_untrained(folder: Path) -> bool:
    """Return whether all biases of the projector are zero, as `vtlmm compose` initializes them."""
    biases = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            names = [name for name in tensors.keys() if "multi_modal_projector" in name and name.endswith("bias")]
            biases += [bool(tensors.get_tensor(name).any()) for name in names]
    return bool(biases) and not any(biases)
