# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The settings of a run, or of a recipe's stages, from YAML: known, and such as go together."""

import difflib
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser

from vtlmm.data.rows import DataConfig
from vtlmm.hub.quantize import quantization_config

from .adapters import AdapterConfig
from .config import VTLMMTrainingConfig


@dataclass
class ModelConfig:
    """What is trained: a VT-LMM folder or Hub id, and how it is loaded."""

    model: str = field(
        metadata={"help": "Folder or Hub id of a VT-LMM (`vtlmm compose` and `vtlmm convert` make one)."}
    )
    revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a Hub id."})
    dtype: str = field(
        default="float32", metadata={"help": "Type of the weights. AdamW loses small steps in bfloat16."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, …"})
    use_pseudo_image_features: bool | None = field(
        default=None, metadata={"help": "Whether the decoder reads pseudo image features, if not as the model says."}
    )
    vm_head_type: str | None = field(
        default=None, metadata={"help": "Begin with a new VM head: linear, mlp or attention; for stage III."}
    )


CONFIGS = (ModelConfig, DataConfig, AdapterConfig, VTLMMTrainingConfig)


def read_settings(path: str | Path, overrides: list[str] = ()) -> dict:
    """
    The settings of a YAML recipe, with `key=value` pairs (the value in YAML) on top.

    A recipe for several stages has `stages`, for each its own settings, which go before the others;
    `stages.joint.learning_rate=1e-4` changes one of them.

    Raises:
        `ValueError`: for a key that no configuration has, with the nearest one that exists.
    """
    settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    change_settings(settings, overrides)
    return check_settings(settings, path)


def change_settings(settings: dict, overrides: list[str]) -> None:
    """Puts `key=value` pairs (the value in YAML) into nested `settings`; `a.b=value` into the `b` of `a`."""
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise ValueError(f"{override!r} is not of the form key=value.")
        *parents, key = key.split(".")
        place = settings
        for parent in parents:
            place[parent] = place = place.get(parent) or {}
            if not isinstance(place, dict):
                raise ValueError(f"{override!r}: {parent!r} holds {place!r}, which has no settings below it.")
        place[key] = yaml.safe_load(value)


def check_settings(settings: dict, path: str | Path) -> dict:
    """Settings of `path`, of one stage or several, with known keys only and numbers that YAML reads as text."""
    if "stages" not in settings:
        return _checked(settings, path)
    stages = settings["stages"]
    if not isinstance(stages, dict) or not all(own is None or isinstance(own, dict) for own in stages.values()):
        raise ValueError(f"{path}: `stages` must name its stages, each with its settings below it (or nothing).")
    stages = {stage: _checked(own or {}, path) for stage, own in stages.items()}
    return {**_checked({key: value for key, value in settings.items() if key != "stages"}, path), "stages": stages}


def _checked(settings: dict, path: str | Path) -> dict:
    known = [f.name for config in CONFIGS for f in fields(config) if f.init]
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, [*known, "stages"], 1)
            raise ValueError(f"{path}: there is no setting {key!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
            settings[key] = float(value)  # YAML reads 2e-5 as text
        if value is False and key.endswith("_strategy"):
            settings[key] = "no"  # and an unquoted no as false
    return settings


def split_stages(settings: dict) -> list[dict]:
    """
    One run for each of `stages`, in their order: from the folder that the one before it wrote, into a folder of its
    own in `output_dir`. Settings without `stages` are one run.

    Raises:
        `ValueError`: when a run's settings do not fit together: before the first run, not after it.
    """
    if "stages" not in settings:
        return [settings]
    shared = {key: value for key, value in settings.items() if key != "stages"}
    for key in ("model", "output_dir"):
        if key not in shared:
            raise ValueError(
                f"A recipe with `stages` needs `{key}`: the first begins with `model`, each writes below it."
            )
    for key in ("vm_head_type", "vm_head_init"):
        if key in shared:  # each stage would begin with a new VM head, also the one that the trained head teaches
            raise ValueError(f"`{key}` belongs below the stage that it is for, e.g. stages.visual_head.{key}.")
    runs, model = [], shared["model"]
    for stage, own in settings["stages"].items():
        wrong = [f"stages.{stage}.{key}" for key in ("model", "output_dir", "stage") if key in own]
        wrong += ["stage"] if "stage" in shared else []
        if wrong:
            raise ValueError(f"In a recipe with `stages` {', '.join(wrong)} follows from their order: leave it out.")
        output_dir = str(Path(shared["output_dir"], stage))
        runs.append({**shared, **own, "stage": stage, "model": model, "output_dir": output_dir})
        model = output_dir
    for number, run in enumerate(runs, 1):
        if parse_settings(run)[2].adapter != "none" and number < len(runs):
            raise ValueError(
                f"Stage {run['stage']} would leave an adapter, and the next begins with a whole model: run the stages "
                "one by one, with `vtlmm merge` between."
            )
    return runs


def parse_settings(settings: dict) -> tuple[ModelConfig, DataConfig, AdapterConfig, VTLMMTrainingConfig]:
    """The four configurations of a run."""
    return HfArgumentParser(CONFIGS).parse_dict(settings)


def check_run(model: ModelConfig, data: DataConfig, adapter: AdapterConfig, args: VTLMMTrainingConfig) -> None:
    """
    Raises:
        `ValueError`: for settings of one run that do not go together, as far as the settings alone tell, and for a
            quantized decoder without bitsandbytes.
    """
    quantization_config(adapter.quantization, torch.float32)  # or bitsandbytes would be missed when the model loads
    if adapter.adapter != "none" and model.dtype != "float32" and not (args.bf16 or args.fp16):
        raise ValueError(
            f"What learns beside a base in {model.dtype} is float32, and only mixed precision multiplies the two: set "
            "`bf16: true`, or `dtype: float32`."
        )
    new_head = "vm_head_type" if model.vm_head_type else "vm_head_init" if args.vm_head_init != "keep" else None
    if adapter.adapter != "none" and new_head and "vm_head" not in args.resolved_stage().trains:
        raise ValueError(
            f"`{new_head}` makes a new VM head, which an adapter of stage {args.stage} does not carry: leave it out, "
            "or add vm_head to `trainable_modules`."
        )
    needs_evaluation = {
        "eval_task_data": data.eval_task_data,
        "vm_head_candidates": args.vm_head_candidates,
        f"eval_strategy: {args.eval_strategy.value}": args.eval_strategy != "no",
    }
    for name, is_set in needs_evaluation.items():
        if is_set and data.eval_dataset is None and data.eval_split is None:
            raise ValueError(f"`{name}` needs an evaluation, and there are no data for it: set `eval_dataset`.")
    by_length = "packing" if args.packing else args.train_sampling_strategy
    if data.streaming and by_length in ("packing", "group_by_length"):
        raise ValueError(f"A stream does not know its rows' lengths, which {by_length} goes by: take one of them out.")
    if data.streaming and args.cache_image_features:
        raise ValueError("A stream does not know its images before: take `streaming` or `cache_image_features` out.")
