# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The settings of the datasets of a run. This module imports neither torch nor TRL."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vtlmm.data.rows import load_rows

from .mixture_settings import MIXTURE_KEYS, mixture_entries, part_names


MAX_LENGTH = 2048  # default of `max_length`, in tokens


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
