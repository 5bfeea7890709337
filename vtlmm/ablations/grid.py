# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A grid of trainings from its file: arms that differ in a setting, each a chain of stages, with several seeds."""

import copy
import functools
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from vtlmm.data.rows import load_rows
from vtlmm.inference.resumable import digest
from vtlmm.train.recipe import change_settings, check_settings, split_stages


PARTS = ("seeds", "reference", "base", "arms", "evaluate")
# Of a start: what its weights, prompts and images depend on, not where it comes from
START_FILES = ("*.safetensors", "config.json", "processor_config.json", "tokenizer.json", "*.jinja")
FIGURES = ("accuracy", "blind", "pseudo", "visual", "text", "others")


@dataclass(frozen=True)
class EvaluateConfig:
    r"""
    What is measured after each run.

    Parameters:
        dataset (`str`): questions with answers, as for training; none of the training's.
        dataset_split, image_folder, max_rows: see `load_rows`. With `max_rows` the table says that it is a subset.
        figures (`list[str]`): of `"accuracy"`; `"blind"`: the same with shuffled images; `"pseudo"`: the same with
            pseudo image features; `"visual"`: the losses of stages III and IV and the entropies of the visual
            tokens; `"text"`: perplexity on `text`; `"others"`: yes/no questions, calibration and entropies of the
            visual tokens on the images of `others`, beside the held-out ones.
        kind (`str`, *optional*): column with the kinds of the questions.
        kinds (`dict[str, list[str]]`, *optional*): or each kind with the answers by which it is known.
        scorer (`str`, *optional*, defaults to `"exact"`): see `vtlmm eval`.
        text (`str`, *optional*): file of held-out texts, one a line.
        others (`dict[str, str]`, *optional*): name → data with images of another kind, in any form of training data;
            all rows of each.
        use_pseudo_image_features (`bool`, *optional*): what the decoder reads in the place of images, if not as
            the model says. An arm may set it alone: `evaluate` beside its stages.
        batch_size (`int`, *optional*, defaults to 64), max_new_tokens (`int`, *optional*, defaults to 16)
    """

    dataset: str | None = None
    dataset_split: str = "train"
    image_folder: str | None = None
    max_rows: int | None = None
    figures: tuple[str, ...] = ("accuracy", "blind")
    kind: str | None = None
    kinds: dict[str, list[str]] = field(default_factory=dict)
    scorer: str = "exact"
    text: str | None = None
    others: dict[str, str] = field(default_factory=dict)
    use_pseudo_image_features: bool | None = None
    batch_size: int = 64
    max_new_tokens: int = 16

    def __post_init__(self):
        unknown = set(self.figures) - set(FIGURES)
        if unknown:
            raise ValueError(f"evaluate: there are no figures {sorted(unknown)}; there are {', '.join(FIGURES)}.")
        if ("text" in self.figures) != (self.text is not None):
            raise ValueError("evaluate: the figure text and the file `text` need each other.")
        if ("others" in self.figures) != bool(self.others):
            raise ValueError("evaluate: the figure others and the data `others` need each other.")
        if self.dataset is None:
            raise ValueError("evaluate.dataset is not set: name the held-out questions.")

    def load_rows(self, keep_columns: tuple[str, ...] = ()):
        """Return the rows of the held-out questions. See [`~vtlmm.data.rows.load_rows`]."""
        return load_rows(
            str(self.dataset),
            split=self.dataset_split,
            image_folder=self.image_folder,
            max_rows=self.max_rows,
            keep_columns=keep_columns,
        )


@dataclass
class Grid:
    """A grid file; `arms` are name → stages with what differs from `base`, in their order."""

    path: str
    base: dict
    arms: dict[str, dict]
    evaluate: dict
    seeds: list[int]
    reference: str
    _chains: dict = field(default_factory=dict)  # reading settings takes a tenth of a second

    def chain(self, arm: str, seed: int) -> list[dict]:
        r"""
        The stages of one run, each with its `key`: a digest of what its weights depend on, all stages before it, the
        start and the data included. Chains that begin alike have equal keys there.
        """
        if (arm, seed) in self._chains:
            return self._chains[arm, seed]
        settings = _with_seed(copy.deepcopy(self.base), seed)
        own = settings.pop("stages", {})
        stages = {s: {**own.get(s, {}), **changes} for s, changes in self.arms[arm].items() if s != "evaluate"}
        chain = split_stages({**settings, "seed": seed, "output_dir": "", "stages": stages})
        key = digest(_content(chain[0]["model_name_or_path"]))
        for run in chain:
            named = {name: value for name, value in run.items() if name not in ("model_name_or_path", "output_dir")}
            for name in ("dataset_name", "eval_dataset"):
                if named.get(name):
                    named[name] = _content(named[name])
            if named.get("cache_image_features"):
                named["cache_image_features"] = True  # in whichever folder
            run["key"] = key = digest([key, named])
        return self._chains.setdefault((arm, seed), chain)

    def measures(self, arm: str) -> EvaluateConfig:
        """What is measured of an arm."""
        try:
            return EvaluateConfig(**{**self.evaluate, **self.arms[arm].get("evaluate", {})})
        except TypeError as error:
            raise ValueError(f"{self.path}, evaluate: {error}.") from error

    def run_key(self, arm: str, seed: int) -> str:
        """Of everything that the figures of one run depend on."""
        measures = dict(vars(self.measures(arm)))
        measures.pop("batch_size")
        others = {name: _content(data) for name, data in measures.pop("others").items()}
        if others:
            measures["others"] = others
        for name in ("dataset", "text"):
            measures[name] = measures[name] and _content(measures[name])
        return digest([self.chain(arm, seed)[-1]["key"], measures])


def read_grid(path: str | Path, overrides: list[str] = ()) -> Grid:
    r"""
    A grid file with `key=value` pairs on top: of `evaluate.…`, `arms.…`, `seeds`, `reference` and `base`; any other is
    a setting of all arms. `base` may be a file beside the grid: settings as in a recipe, and `evaluate`, what grids
    with it measure if they do not say otherwise.

    Every setting of every arm is checked, so that a mistake in the last does not stop a grid after hours.

    Raises:
        `ValueError`: for a part, setting or value that there is not.
    """
    grid = {"evaluate": None, **(yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {})}
    own = [override for override in overrides if re.split(r"[.=]", override)[0] in PARTS]
    change_settings(grid, own)
    base = grid.setdefault("base", {})
    if isinstance(base, str):
        base = yaml.safe_load(Path(path).with_name(base).read_text(encoding="utf-8"))
    change_settings(base, [override for override in overrides if override not in own])
    wrong = set(grid) ^ set(PARTS)
    if wrong:
        raise ValueError(f"{path}: a grid has {', '.join(PARTS)}; unknown or missing: {', '.join(sorted(wrong))}.")
    if not grid["seeds"] or not grid["arms"]:
        raise ValueError(f"{path}: a grid needs a seed and an arm at least.")
    arms = {}
    for arm, stages in grid["arms"].items():
        if not stages:
            raise ValueError(f"{path}, arm {arm}: name its stages.")
        settings = {stage: changes or {} for stage, changes in stages.items() if stage != "evaluate"}
        arms[arm] = check_settings({"stages": settings}, f"{path}, arm {arm}")["stages"]
        if "evaluate" in stages:  # all arms are asked the same questions, or they could not be paired
            if list(stages["evaluate"]) != ["use_pseudo_image_features"]:
                raise ValueError(f"{path}, arm {arm}: an arm's evaluate may set use_pseudo_image_features only.")
            arms[arm]["evaluate"] = stages["evaluate"]
    if grid["reference"] not in arms:
        raise ValueError(f"{path}: the reference {grid['reference']!r} is no arm; there are {', '.join(arms)}.")
    evaluate = {**base.pop("evaluate", {}), **(grid["evaluate"] or {})}
    found = Grid(str(path), check_settings(base, path), arms, evaluate, list(grid["seeds"]), grid["reference"])
    for arm in arms:
        found.measures(arm)
        found.chain(arm, found.seeds[0])
    return found


def _with_seed(settings, seed: int):
    """`{seed}` in a text becomes the seed: a start of its own for each."""
    if isinstance(settings, dict):
        return {key: _with_seed(value, seed) for key, value in settings.items()}
    return settings.replace("{seed}", str(seed)) if isinstance(settings, str) else settings


def _content(name: str) -> list[str]:
    """Digests of a file or of a model's folder, so that a copy elsewhere is the same; of anything else its name."""
    path = Path(name)
    if path.is_dir():
        files = sorted({file for pattern in START_FILES for file in path.glob(pattern)})
        if files:
            return [_digest_of_file(file) for file in files]
    return [_digest_of_file(path)] if path.is_file() else [name]


@functools.cache  # asked for once a run
def _digest_of_file(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()[:16]
