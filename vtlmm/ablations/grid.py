# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Read a grid: arms that differ in a few settings, each a chain of training stages, and the seeds to run them with."""

import copy
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from vtlmm.data.rows import load_rows
from vtlmm.data.setting_values import require_integers
from vtlmm.inference.resumable import digest
from vtlmm.train.mixture_settings import mixture_entries
from vtlmm.train.recipe import change_settings, check_settings, parse_settings, read_yaml
from vtlmm.train.setting_checks import validate
from vtlmm.train.setting_types import convert_setting, suggest
from vtlmm.train.stage_settings import split_stages


PARTS = ("seeds", "reference", "base", "arms", "evaluate")
METRICS = (
    "accuracy",
    "accuracy_shuffled_images",
    "accuracy_pseudo_image_features",
    "caption_matching",
    "hard_caption_matching",
    "visual_tokens",
    "text_perplexity",
    "ood",
)
# Files of a start model that its weights, prompts and images depend on
START_FILES = ("*.safetensors", "config.json", "processor_config.json", "tokenizer.json", "*.jinja")


@dataclass(frozen=True)
class EvaluateConfig:
    r"""
    What to measure after each run.

    Parameters:
        dataset (`str`): held-out questions with answers, in any format of the training data.
        dataset_split, image_folder, columns, max_rows: see [`load_rows`]. With `max_rows`, the table says that it is
            a subset.
        metrics (`list[str]`):
            `"accuracy"`; `"accuracy_shuffled_images"`, each question with the image of another question;
            `"accuracy_pseudo_image_features"`, the decoder reads pseudo image features; `"caption_matching"`, how
            often an answer is likelier with its own image than with the next row's, see
            [`~vtlmm.analysis.caption_matching.measure_caption_matching`]; `"hard_caption_matching"`, the same with
            the image whose caption has the most words in common; `"visual_tokens"`, the visual losses of stages III
            and IV, also with the visual tokens of another image, and the entropies of both heads;
            `"text_perplexity"`, on `text_file`; `"ood"`, yes/no questions, calibration and entropies on the images of
            `ood_datasets` and of `dataset`.
        kind (`str`, *optional*): column with the kind of each question.
        kinds (`dict[str, list[str]]`, *optional*): kind → its answers, for a dataset without such a column.
        scorer (`str`, *optional*, defaults to `"exact"`): see `vtlmm eval`.
        text_file (`str`, *optional*): file of held-out texts, one in each line.
        ood_datasets (`dict[str, str]`, *optional*): name → out-of-distribution images, in any format of the training
            data. All rows are used.
        use_pseudo_image_features (`bool`, *optional*): whether the decoder reads pseudo image features. Default: as
            the model says. This is the one setting that an arm may change.
        batch_size (`int`, *optional*, defaults to 64): questions or images per forward pass.
        max_new_tokens (`int`, *optional*, defaults to 16): longest answer in tokens.
    """

    dataset: str | None = None
    dataset_split: str = "train"
    image_folder: str | None = None
    columns: dict | None = None
    max_rows: int | None = None
    metrics: list[str] = field(default_factory=lambda: ["accuracy", "accuracy_shuffled_images"])
    kind: str | None = None
    kinds: dict[str, list[str]] = field(default_factory=dict)
    scorer: str = "exact"
    text_file: str | None = None
    ood_datasets: dict[str, str] = field(default_factory=dict)
    use_pseudo_image_features: bool | None = None
    batch_size: int = 64
    max_new_tokens: int = 16

    def __post_init__(self):
        unknown = sorted(set(self.metrics) - set(METRICS))
        if unknown:
            raise ValueError(f"`metrics` has unknown names {unknown}. Use some of {', '.join(METRICS)}.")
        if ("text_perplexity" in self.metrics) != (self.text_file is not None):
            raise ValueError("The metric text_perplexity and the setting `text_file` need each other.")
        if ("ood" in self.metrics) != bool(self.ood_datasets):
            raise ValueError("The metric ood and the setting `ood_datasets` need each other.")
        if self.text_file is not None and not Path(self.text_file).is_file():
            raise ValueError(f"`text_file`: the file {self.text_file} does not exist.")
        require_integers(max_rows=self.max_rows, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        if self.dataset is None:
            raise ValueError("`dataset` is not set. Name the held-out questions: evaluate.dataset=FILE.")

    @classmethod
    def from_settings(cls, settings: dict[str, Any], source: str) -> "EvaluateConfig":
        """
        Return the configuration with values of the declared types.

        Raises:
            `ValueError`: for an unknown setting or an invalid value. The error names `source`.
        """
        hints = get_type_hints(cls)
        try:
            for name in settings:
                if name not in hints:
                    raise ValueError(f"unknown setting {name!r}.{suggest(str(name), hints)}")
            return cls(**{name: convert_setting(name, value, hints[name]) for name, value in settings.items()})
        except ValueError as error:
            raise ValueError(f"{source}, evaluate: {error}") from None

    def load_rows(self, keep_columns: tuple[str, ...] = ()):
        """Return the rows of the held-out questions. See [`~vtlmm.data.rows.load_rows`]."""
        return load_rows(
            str(self.dataset),
            split=self.dataset_split,
            image_folder=self.image_folder,
            columns=self.columns,
            max_rows=self.max_rows,
            keep_columns=keep_columns,
        )


@dataclass
class Grid:
    r"""
    A grid of trainings.

    Attributes:
        path (`str`): the grid file.
        base (`dict`): settings of all arms.
        arms (`dict[str, dict]`): name → stage → settings of this stage that differ from `base`.
        evaluate (`dict`): settings of [`EvaluateConfig`].
        seeds (`list[int]`)
        reference (`str`): the arm that the others are compared with.
    """

    path: str
    base: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    evaluate: dict[str, Any]
    seeds: list[int]
    reference: str
    _chains: dict[tuple[str, int], list[dict[str, Any]]] = field(default_factory=dict)  # one takes 0.1 s to parse

    def chain(self, arm: str, seed: int) -> list[dict[str, Any]]:
        r"""
        Return the settings of each stage of one run.

        Each stage has a `key`: a hash of everything that its weights depend on, i.e. the start model, the data, the
        seed and the settings of this and all earlier stages. Runs with the same first stages have the same keys there.
        """
        if (arm, seed) in self._chains:
            return self._chains[arm, seed]
        settings = _with_seed(copy.deepcopy(self.base), seed)
        base_stages = settings.pop("stages", {})
        changes = {stage: settings for stage, settings in self.arms[arm].items() if stage != "evaluate"}
        stages = {stage: {**base_stages.get(stage, {}), **changed} for stage, changed in changes.items()}
        chain = split_stages({**settings, "seed": seed, "output_dir": "", "stages": stages})
        key = digest(_content(chain[0]["model_name_or_path"]))
        for run in chain:
            hashed = {name: value for name, value in run.items() if name not in ("model_name_or_path", "output_dir")}
            for name in ("dataset_name", "eval_dataset"):
                if hashed.get(name):
                    hashed[name] = (
                        [{**entry, "name": _content(entry["name"])} for entry in mixture_entries(hashed[name])]
                        if isinstance(hashed[name], list)
                        else _content(hashed[name])
                    )
            if hashed.get("cache_image_features"):
                hashed["cache_image_features"] = True  # the folder does not change the features
            run["key"] = key = digest([key, hashed])
        return self._chains.setdefault((arm, seed), chain)

    def evaluation(self, arm: str) -> EvaluateConfig:
        """Return what to measure for an arm."""
        return EvaluateConfig.from_settings({**self.evaluate, **self.arms[arm].get("evaluate", {})}, self.path)

    def run_key(self, arm: str, seed: int) -> str:
        """Return a hash of everything that the metrics of one run depend on."""
        evaluation = dict(vars(self.evaluation(arm)))
        evaluation.pop("batch_size")
        if evaluation["columns"] is None:  # runs from before this setting have the same key
            evaluation.pop("columns")
        evaluation["ood_datasets"] = {name: _content(data) for name, data in evaluation["ood_datasets"].items()}
        for name in ("dataset", "text_file"):
            evaluation[name] = evaluation[name] and _content(evaluation[name])
        return digest([self.chain(arm, seed)[-1]["key"], evaluation])


def read_grid(path: str | Path, overrides: Sequence[str] = ()) -> Grid:
    r"""
    Read a grid file.

    All settings of all arms are checked, so that a mistake in the last arm does not stop the grid after hours.

    Args:
        path (`str` or `Path`): the grid file. Its `base` may be the name of a file in the same folder: settings as in
            a recipe, and `evaluate` with defaults for the grid's `evaluate`.
        overrides (`Sequence[str]`, *optional*): `key=value` pairs. Keys that start with `evaluate`, `arms`, `seeds`,
            `reference` or `base` change the grid. Every other key is a setting of all arms.

    Raises:
        `FileNotFoundError`: if the grid or its base does not exist.
        `ValueError`: for an unknown or missing part, setting or value.
    """
    grid = {"evaluate": None, **read_yaml(Path(path), "grid", "recipes/ablations/")}
    changes = [override for override in overrides if re.split(r"[.=]", override)[0] in PARTS]
    change_settings(grid, changes)
    base = grid.setdefault("base", {})
    if isinstance(base, str):
        base = read_yaml(Path(path).with_name(base), "base", "recipes/ablations/")
    change_settings(base, [override for override in overrides if override not in changes])
    wrong = set(grid) ^ set(PARTS)
    if wrong:
        raise ValueError(f"{path}: a grid has {', '.join(PARTS)}; unknown or missing: {', '.join(sorted(wrong))}.")
    if not grid["seeds"] or not grid["arms"]:
        raise ValueError(f"{path}: a grid needs at least one seed and one arm.")
    arms = {name: _check_arm(stages, f"{path}, arm {name}") for name, stages in grid["arms"].items()}
    if grid["reference"] not in arms:
        raise ValueError(f"{path}: the reference {grid['reference']!r} is not an arm. Use one of {', '.join(arms)}.")
    evaluate = {**(base.pop("evaluate", None) or {}), **(grid["evaluate"] or {})}
    try:
        seeds = convert_setting("seeds", grid["seeds"], list[int])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    checked = Grid(str(path), check_settings(base, path), arms, evaluate, seeds, grid["reference"])
    _check_runs(checked)
    return checked


def _check_runs(grid: Grid) -> None:
    """Check the evaluation and the stages of every arm as before a training, each shared stage once."""
    checked = set()
    for arm in grid.arms:
        grid.evaluation(arm)
        chain = grid.chain(arm, grid.seeds[0])
        for run in chain:
            source = f"{grid.path}, arm {arm}, stage {run['stage']}"
            if run.get("use_peft") and run is not chain[-1]:
                raise ValueError(f"{source}: `use_peft` is supported in the last stage of an arm only.")
            if run["key"] not in checked:
                checked.add(run["key"])
                try:
                    validate(parse_settings({name: value for name, value in run.items() if name != "key"}))
                except ValueError as error:
                    raise ValueError(f"{source}: {error}") from None


def _check_arm(stages: Any, source: str) -> dict[str, Any]:
    """Return the stages of an arm with checked settings."""
    if not isinstance(stages, dict) or not set(stages) - {"evaluate"}:
        raise ValueError(f"{source}: name its stages, e.g. `{{visual_head: , joint: }}`.")
    settings = {stage: changes or {} for stage, changes in stages.items() if stage != "evaluate"}
    checked = check_settings({"stages": settings}, source)["stages"]
    if "evaluate" in stages:  # the arms are paired question by question, so all answer the same questions
        if list(stages["evaluate"] or ()) != ["use_pseudo_image_features"]:
            raise ValueError(f"{source}: `evaluate` of an arm may set use_pseudo_image_features only.")
        checked["evaluate"] = stages["evaluate"]
    return checked


def _with_seed(settings: Any, seed: int) -> Any:
    """Replace `{seed}` in all texts, so that each seed can have another start model."""
    if isinstance(settings, dict):
        return {key: _with_seed(value, seed) for key, value in settings.items()}
    return settings.replace("{seed}", str(seed)) if isinstance(settings, str) else settings


def _content(name: str) -> list[str]:
    """Return hashes of a file, or of the files of a model folder, so that copies are equal; the name of a Hub id."""
    path = Path(name)
    if path.is_dir():
        files = sorted({file for pattern in START_FILES for file in path.glob(pattern)})
        if files:
            return [_file_hash(file) for file in files]
    return [_file_hash(path)] if path.is_file() else [name]


@functools.cache  # each run needs the hash of the same files
def _file_hash(path: Path) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()[:16]
