# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Read the settings of a training run from a YAML recipe and from the command line."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import yaml
from transformers import HfArgumentParser
from trl import SFTConfig

from vtlmm.data.rows import load_rows

from .adapters import AdapterConfig
from .config import VTLMMTrainingConfig
from .mixture_settings import MIXTURE_KEYS, mixture_entries, part_names
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
class DatasetConfig:
    r"""
    The datasets of a training run.

    `dataset_name`, `dataset_config`, `dataset_train_split`, `dataset_test_split` and `dataset_streaming` mean the same
    as in [`trl.ScriptArguments`]. One default differs: a run without `dataset_test_split` and `eval_dataset` does not
    evaluate.

    Parameters:
        dataset_name (`str` or `list`): file, folder or Hub dataset id, or a list of them for a mixture. An entry of
            the list may be a mapping with `name` and, *optional*, `config`, `split`, `test_split`, `image_folder`,
            `columns` and `max_rows`, which replace the settings below, and `weight`. See [`mix_datasets`]. Test
            splits are evaluated one by one: `eval_NAME_loss`, where NAME is the file or dataset.
        dataset_config (`str`, *optional*): configuration of the Hub dataset.
        dataset_train_split (`str`, *optional*, defaults to `"train"`): split, or a slice such as `"train[:2000]"`. A
            file has one split, `"train"`.
        dataset_test_split (`str`, *optional*): split for evaluation, of `eval_dataset` or of `dataset_name`.
        dataset_streaming (`bool`, *optional*, defaults to `False`): read rows during training. The evaluation data are
            never streamed.
        eval_dataset (`str`, *optional*): evaluation data from another file, folder or Hub dataset.
        eval_config (`str`, *optional*): its configuration; by default `dataset_config`, for the same Hub dataset.
        eval_task_data (`str`, *optional*): file of questions. Each evaluation answers them and scores the answers by
            exact match, with their images and with shuffled images (`eval_accuracy`,
            `eval_accuracy_shuffled_images`).
        eval_task_images (`int`, *optional*, defaults to 100): number of images, from the first, to ask about.
        eval_caption_data (`str`, *optional*): file of captioned images that are not in the training data. Each
            evaluation measures whether visual tokens name what they show, see [`CaptionWordsCallback`].
        image_folder (`str`, *optional*): folder that image paths are relative to. Default: the folder of the file.
        columns (`dict`, *optional*): names of columns in the dataset, `{image: photo, answer: reply}`.
        max_rows (`int`, *optional*): largest number of rows of each split.
        one_question_per_row (`bool`, *optional*, defaults to `False`): split a conversation into one row for each
            question, without the earlier turns. A small model otherwise copies earlier answers.
        check_data (`bool`, *optional*, defaults to `True`): check all rows and images before training.
        bad_rows (`str`, *optional*, defaults to `"raise"`): `"raise"` or `"skip"` rows that fail the check. A row of
            an unknown format, or with a column that would be ignored, is an error anyway: usually all rows are alike.
    """

    # HfArgumentParser reads the second member of this union
    dataset_name: list[Any] | str | None = field(
        default=None, metadata={"help": "File, folder or Hub id of the training data, or a list of them."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split, or a slice of one: train[:2000]."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split for evaluation."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read rows during training."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Evaluation data, if from another source."})
    eval_config: str | None = field(default=None, metadata={"help": "Configuration of `eval_dataset`."})
    eval_task_data: str | None = field(default=None, metadata={"help": "File of questions to answer at evaluations."})
    eval_task_images: int = field(default=100, metadata={"help": "Number of images to ask about."})
    eval_caption_data: str | None = field(default=None, metadata={"help": "Captions to compare visual tokens with."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder that image paths are relative to."})
    columns: dict | None = field(default=None, metadata={"help": "Names of columns: {image: photo, answer: reply}."})
    max_rows: int | None = field(default=None, metadata={"help": "Largest number of rows of each split."})
    one_question_per_row: bool = field(default=False, metadata={"help": "Split conversations into their questions."})
    check_data: bool = field(default=True, metadata={"help": "Check all rows and images before training."})
    bad_rows: str = field(default="raise", metadata={"help": "What to do with broken rows: raise or skip."})

    def __post_init__(self):
        if not self.dataset_name:
            raise ValueError("`dataset_name` is not set. Name a file, a folder or a Hub dataset.")
        if isinstance(self.dataset_name, list):
            mixture_entries(self.dataset_name)
        if self.eval_task_images < 1:
            raise ValueError(f"`eval_task_images` is {self.eval_task_images}; it must be 1 or more.")
        if self.bad_rows not in ("raise", "skip"):
            raise ValueError(f"`bad_rows` is {self.bad_rows!r}; it must be raise or skip.")

    def parts(self, split: str) -> list[tuple[str, "DatasetConfig", float | None]]:
        """Return the name, the settings and the weight of each dataset of `"train"` or `"eval"`."""
        if not isinstance(self.dataset_name, list):
            return [(str(self.dataset_name), self, None)]
        if split == "eval" and self.eval_dataset is not None:
            return [(str(self.eval_dataset), replace(self, dataset_name=self.eval_dataset), None)]
        entries = mixture_entries(self.dataset_name)
        parts = []
        for name, entry in zip(part_names([entry["name"] for entry in entries]), entries, strict=True):
            weight = entry.pop("weight", None)
            parts.append((name, replace(self, **{MIXTURE_KEYS[key]: value for key, value in entry.items()}), weight))
        return parts

    def load(self, split: str):
        """Return the rows of `"train"` or `"eval"`, or None without evaluation data. See [`load_rows`]."""
        name, config_name, part = self.dataset_name, self.dataset_config, self.dataset_train_split
        if split == "eval":
            if self.eval_dataset is None and self.dataset_test_split is None:
                return None
            name, part = self.eval_dataset or name, self.dataset_test_split or "train"
            config_name = self.eval_config or (config_name if name == self.dataset_name else None)
        return load_rows(
            str(name),
            image_folder=self.image_folder,
            split=part,
            config_name=config_name,
            streaming=self.dataset_streaming and split == "train",
            columns=self.columns,
            max_rows=self.max_rows,
            one_question_per_row=self.one_question_per_row,
        )

    def has_evaluation_data(self) -> bool:
        """Return whether there are rows to evaluate on."""
        tests = [part.dataset_test_split for _, part, _ in self.parts("train")]
        return self.eval_dataset is not None or any(test is not None for test in tests)

    def load_eval_file(self, setting: Literal["eval_task_data", "eval_caption_data"]):
        """Return the rows of the file that `setting` names, or None if it is not set."""
        path = getattr(self, setting)
        if path is None:
            return None
        if not Path(path).is_file():
            raise FileNotFoundError(f"`{setting}`: the file {path} does not exist.")
        return load_rows(path, image_folder=self.image_folder)


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
STAGE_KEYS = ("model_name_or_path", "output_dir", "stage")


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
            own = "training" if group == "stage" and f.name in inherited else group
            table.append(Setting(own, f.name, format_hint(HINTS[f.name]), text, help_text))
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
        or not all(own is None or isinstance(own, dict) for own in stages.values())
    ):
        raise ValueError(f"{source}: `stages` must map each stage to its settings (or to nothing).")
    checked = {stage: _check_flat(own or {}, source) for stage, own in stages.items()}
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
    for stage, own in settings["stages"].items():
        given = [f"stages.{stage}.{key}" for key in STAGE_KEYS if key in own] + ["stage"] * ("stage" in shared)
        if given:
            raise ValueError(f"A recipe with `stages` sets {', '.join(given)} itself. Remove this setting.")
        output_dir = str(Path(shared["output_dir"], stage))
        run = {**shared, **own, "stage": stage, "model_name_or_path": model, "output_dir": output_dir}
        if runs:
            run.pop("model_revision", None)  # the revision of the first stage's model
        runs.append(run)
        model = str(merged_folder(run) if run.get("use_peft") else output_dir)
    return runs


def merged_folder(run: dict[str, Any]) -> Path:
    """Return the folder for the whole model of a stage that trains an adapter."""
    return Path(run.get("output_dir") or "trainer_output", "merged")
