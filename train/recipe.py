# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Read the settings of a training run from a YAML recipe and from the command line."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from transformers import HfArgumentParser
from trl import SFTConfig

from .adapters import AdapterConfig
from .config import VTLMMTrainingConfig
from .dataset_config import DatasetConfig
from .setting_types import Setting, convert_setting, format_hint, setting_hints, suggest


@dataclass
class ModelConfig:
    """The model to train and how to load it. Field names are those of [`trl.ModelConfig`]."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or Hub id of a VT-LMM (`vtlmm compose` and `vtlmm convert` make one)."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of a Hub id."})
    dtype: str = field(
        default="float32", metadata={"help": "Type of the weights. AdamW loses small updates in bfloat16."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, …"})
    use_pseudo_image_features: bool | None = field(
        default=None, metadata={"help": "Whether the decoder reads pseudo image features. Default: as the model says."}
    )
    vm_head_type: str | None = field(
        default=None, metadata={"help": "Replace the VM head by a new one: linear, mlp or attention. For stage III."}
    )

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` is {self.dtype!r}; it must be float32, bfloat16 or float16.")


@dataclass
class OutputConfig:
    """What to do with an output folder that already holds a model."""

    overwrite: bool = field(
        default=False, metadata={"help": "Delete the model and the checkpoints in `output_dir` and train again."}
    )


class RunSettings(NamedTuple):
    """All settings of one stage, as dataclasses."""

    model: ModelConfig
    data: DatasetConfig
    adapter: AdapterConfig
    output: OutputConfig
    args: VTLMMTrainingConfig


CONFIGS = (ModelConfig, DatasetConfig, AdapterConfig, OutputConfig, VTLMMTrainingConfig)
GROUPS = ("model", "data", "adapter", "output", "stage")
HINTS = setting_hints(CONFIGS)


def settings_table() -> list[Setting]:
    """Return every setting of `vtlmm train` with its group, type, default and help text."""
    table = []
    inherited = {f.name for f in fields(SFTConfig)}
    for group, config in zip(GROUPS, CONFIGS, strict=True):
        for f in fields(config):
            if not f.init:
                continue
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            text = "required" if default is MISSING else "null" if default is None else str(default)
            help_text = " ".join(str(f.metadata.get("help", "")).split())
            setting_group = "training" if group == "stage" and f.name in inherited else group
            table.append(Setting(setting_group, f.name, format_hint(HINTS[f.name]), text, help_text))
    order = [*GROUPS, "training"]
    return sorted(table, key=lambda setting: order.index(setting.group))


# ---- Reading settings ----


def parse_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """
    Return the settings of a command line that is written as for TRL: `--config recipe.yaml --learning_rate 1e-4`.

    Options replace the settings of the recipe. `--stages.joint.learning_rate 1e-4` changes one stage. A value is YAML
    (`--trainable_modules "[lm_head, vm_head]"`); several values are a list, and an option without a value is true.

    Args:
        argv (`Sequence[str]`): the arguments after `vtlmm train`.

    Raises:
        `ValueError`: for an unknown setting, with the closest known name, and for a value of the wrong type.
        `FileNotFoundError`: if the recipe does not exist.
    """
    options: list[tuple[str, list[str]]] = []
    for word in argv:
        if re.match(r"--[A-Za-z]", word):
            name, sign, value = word[2:].partition("=")
            options.append((name, [value] if sign else []))
        elif options:
            options[-1][1].append(word)
        else:
            hint = f" Write `--{word.replace('=', ' ', 1)}`." if "=" in word else " Options begin with `--`."
            raise ValueError(f"Unexpected argument {word!r}.{hint}")
    recipes = [values for name, values in options if name == "config"]
    if recipes and (len(recipes) > 1 or len(recipes[0]) != 1):
        raise ValueError("`--config` takes one recipe.")
    for _, values in options:
        if len(values) > 1 and "=" in values[-1] and values[-1].partition("=")[0] in HINTS:
            raise ValueError(f"Unexpected argument {values[-1]!r}. Write `--{values[-1].replace('=', ' ', 1)}`.")
    settings = read_yaml(Path(recipes[0][0])) if recipes else {}
    for name, values in options:
        if name != "config":
            _put(settings, [part.replace("-", "_") for part in name.split(".")], _option_value(values), f"--{name}")
    return check_settings(settings, recipes[0][0] if recipes else "command line")


def read_recipe(path: str | Path, **changes: Any) -> dict[str, Any]:
    """Return the settings of a recipe with `changes` to them. See [`parse_arguments`] for the errors."""
    return check_settings({**read_yaml(Path(path)), **changes}, path)


def read_yaml(path: Path, kind: str = "recipe", examples: str = "recipes/") -> dict[str, Any]:
    """Return the settings in a YAML file, unchecked. Errors name its `kind` and the folder of `examples`."""
    if not path.is_file():
        raise FileNotFoundError(f"The {kind} {path} does not exist. {examples} has examples.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"{path} must hold `setting: value` lines.")
    return settings or {}


def _option_value(values: list[str]) -> Any:
    if not values:
        return True
    parsed = [_yaml_value(value) for value in values]
    return parsed[0] if len(parsed) == 1 else parsed


def _yaml_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _put(settings: dict[str, Any], keys: list[str], value: Any, option: str) -> None:
    """Set a value in nested settings."""
    *parents, last = keys
    place = settings
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise ValueError(f"{option}: {parent!r} is {place!r}, so it has no settings below it.")
    place[last] = value


def change_settings(settings: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set `key=value` pairs in nested `settings`. The value is YAML, and `a.b=value` sets `b` of `a`."""
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise ValueError(f"{override!r} is not of the form key=value.")
        _put(settings, key.split("."), _yaml_value(value), repr(override))


def check_settings(settings: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """
    Return the settings of a recipe, of one stage or of several, with values of the declared types.

    Raises:
        `ValueError`: for an unknown setting or a value of the wrong type. The error names `source`.
    """
    if "stages" not in settings:
        return _check_flat(settings, source)
    stages = settings["stages"]
    if (
        not isinstance(stages, dict)
        or not stages
        or not all(stage_settings is None or isinstance(stage_settings, dict) for stage_settings in stages.values())
    ):
        raise ValueError(f"{source}: `stages` must map each stage to its settings (or to nothing).")
    checked = {stage: _check_flat(stage_settings or {}, source) for stage, stage_settings in stages.items()}
    shared = {key: value for key, value in settings.items() if key != "stages"}
    return {**_check_flat(shared, source), "stages": checked}


def _check_flat(settings: dict[str, Any], source: str | Path) -> dict[str, Any]:
    checked = {}
    for name, value in settings.items():
        if name not in HINTS:
            raise ValueError(f"{source}: unknown setting {name!r}.{suggest(str(name), [*HINTS, 'stages'])}")
        try:
            checked[name] = convert_setting(name, value, HINTS[name])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    return checked


# ---- From settings to runs ----


def parse_settings(settings: dict[str, Any]) -> RunSettings:
    """Return the settings of one stage as dataclasses."""
    if not settings.get("model_name_or_path"):
        raise ValueError("`model_name_or_path` is not set. Name a folder or Hub id of a VT-LMM.")
    return RunSettings(*HfArgumentParser(cast(Any, CONFIGS)).parse_dict(check_settings(settings, "settings")))
