# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The datasets of a run: load and check the rows of one stage or of several."""

import warnings

from accelerate import PartialState
from datasets import IterableDataset

from vtlmm.data.mixture import mix_datasets, with_mixture_index
from vtlmm.data.validation import check_rows, checked_stream

from .config import VTLMMTrainingConfig
from .dataset_checks import load_processor
from .dataset_config import DatasetConfig
from .recipe import RunSettings


def prepare_dataset(
    data: DatasetConfig, split: str, processor, max_length: int | None, max_positions: int | None = None, seed: int = 0
):
    """
    Return the checked rows of one split, or None without such a split. A stream is checked row by row.

    The training rows of a mixture are mixed with `seed`. Its test splits are a `dict` of datasets by name.
    """
    parts = data.parts(split)
    names = [name for name, _, _ in parts]
    prepared = []
    for index, (_, part, _) in enumerate(parts):
        rows = part.load(split)
        if split == "train" and len(parts) > 1:
            rows = with_mixture_index(rows, index, names)
        prepared.append(_checked(rows, part, split, processor, max_length, max_positions))
    if len(prepared) == 1:
        return prepared[0]
    if split == "train":
        return mix_datasets(prepared, [weight for _, _, weight in parts], seed)
    return {name: rows for name, rows in zip(names, prepared, strict=True) if rows is not None} or None


def _checked(dataset, data: DatasetConfig, split: str, processor, max_length: int | None, max_positions: int | None):
    """Return the rows that pass the check, of one dataset."""
    if dataset is None or not data.check_data:
        return dataset
    if isinstance(dataset, IterableDataset):
        max_length = min((n for n in (max_length, max_positions) if n is not None), default=None)
        return checked_stream(dataset, processor, max_length, data.bad_rows)
    report = check_rows(dataset, processor, max_length, max_positions=max_positions)
    good_rows = report.good_rows
    if data.bad_rows == "raise":
        report.raise_for_problems()
    print_once(report.format())
    if not good_rows:
        raise ValueError(f"No row of the {split} split passed the check. Fix the rows listed above.")
    if len(good_rows) < len(dataset) and PartialState().is_main_process:
        warnings.warn(f"{len(dataset) - len(good_rows)} of {len(dataset)} rows are left out.", stacklevel=2)
    # packing and grouping by length read the column `length`
    return dataset.add_column("length", report.lengths).select(good_rows)


def prepare_datasets(
    data: DatasetConfig, processor, args: VTLMMTrainingConfig, max_positions: int | None = None
) -> list:
    """Return the rows to train on and to evaluate on, or None. The trainer shuffles them with `shuffle_dataset`."""
    arguments = (processor, args.max_length, max_positions, args.seed)
    return [prepare_dataset(data, split, *arguments) for split in ("train", "eval")]


def prepare_stages(runs: list[RunSettings]) -> list[list]:
    """Return the datasets of each stage. Stages with the same data settings share them, and they are checked once."""
    first = runs[0]
    # later stages have no model yet; they use the processor of the first stage
    model, trust_remote_code = first.model, first.args.trust_remote_code
    processor, max_positions = load_processor(model.model_name_or_path, model.model_revision, trust_remote_code)
    prepared: dict[str, list] = {}
    keys = []
    for run in runs:
        run.data.load_eval_file("eval_task_data")
        run.data.load_eval_file("eval_caption_data")
        key = repr((run.data, run.args.max_length, run.args.seed))
        if key not in prepared:
            prepared[key] = prepare_datasets(run.data, processor, run.args, max_positions)
        keys.append(key)
    return [prepared[key] for key in keys]


def print_once(text: str) -> None:
    if PartialState().is_main_process:
        print(text, flush=True)
