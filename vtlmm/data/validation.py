# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Check every row and every image before training: what is invalid, where it is, and how to fix it."""

import os
import sys
import warnings

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image, IterableDataset, List
from datasets.utils import tqdm

from .arrow_rows import batches, rows_table
from .check_processes import check_blocks
from .data_report import DataReport, Problem, make_report
from .encoding import describe_row, encode_conversation
from .row_checker import RESULT_FEATURES, RowChecker
from .rows import ROW_FEATURES
from .setting_values import require_integers


# With fewer rows, starting a second process takes longer than it saves
ROWS_PER_PROCESS = 500
# Variables that launchers of distributed runs set for each process
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_rows(
    dataset: Dataset | IterableDataset,
    processor,
    max_length: int | None = None,
    num_proc: int | None = None,
    images: bool = True,
    require_answers: bool = True,
    max_positions: int | None = None,
    require_marks: bool = True,
) -> DataReport:
    r"""
    Check every row, decode every image, and count the tokens that the collator will make.

    The result is never cached: an image file can change while its row does not. The processes of a distributed run
    share the rows of a dataset that is not streamed, and each process gets the whole report.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): rows of [`load_rows`]. A stream is read to
            its end.
        processor ([`VTLMMProcessor`])
        max_length (`int`, *optional*): longest valid row in tokens.
        num_proc (`int`, *optional*): number of processes. Default: the number of cores, for many rows.
        images (`bool`, *optional*, defaults to `True`): False does not open images, for the lengths alone.
        require_answers (`bool`, *optional*, defaults to `True`): False accepts rows that end with a question.
        max_positions (`int`, *optional*): number of positions of the decoder, see [`position_limit`]. It bounds
            `max_length`.
        require_marks (`bool`, *optional*, defaults to `True`): False accepts a chat template that does not mark the
            answers, for rows that a model is asked but not trained on.

    Raises:
        `ValueError`: if the chat template does not mark the answers or their end, or there are no rows.
    """
    require_integers(max_length=max_length, max_positions=max_positions)
    max_length = min((n for n in (max_length, max_positions) if n is not None), default=None)
    checker = RowChecker(processor, max_length, images, require_answers, require_marks)
    if isinstance(dataset, IterableDataset):
        dataset = dataset.decode(False)
        rows = tqdm(dataset, desc="Checking rows")
        tables = [rows_table(checker.check(batch), RESULT_FEATURES) for batch in batches(rows)]
    else:
        tables = _check_shares(dataset, checker, num_proc)
    if not sum(map(len, tables)):
        raise ValueError("There are no rows. Check dataset, dataset_split and max_rows.")
    report = make_report(pa.concat_tables(tables), max_length, max_positions)
    bad_rows = {problem.row for problem in report.problems}
    good = next((row for row in range(report.num_rows) if row not in bad_rows), None)
    if good is not None and require_marks:
        first = dataset.skip(good).take(1)
        # A cast of all rows would read the whole file
        first = first if isinstance(first, IterableDataset) else first.cast_column("images", List(Image(decode=False)))
        report.sample = mark_supervised(processor, next(iter(first)))
    return report


def _check_shares(dataset: Dataset, checker: RowChecker, num_proc: int | None) -> list[pa.Table]:
    """
    Return the results of all rows. Each process of a distributed run checks a share. If one process checked all rows,
    the others would time out.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in LAUNCHERS):
        return _check_share(dataset, checker, num_proc, 0, 1)  # `accelerate` would import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    return gather_object(_check_share(dataset, checker, num_proc, state.process_index, state.num_processes))


def _check_share(
    dataset: Dataset, checker: RowChecker, num_proc: int | None, process_index: int, num_processes: int
) -> list[pa.Table]:
    """Return the results of the rows of one process."""
    if process_index >= len(dataset) > 0:  # `shard` does not return an empty shard
        return []
    share = dataset.shard(num_processes, process_index, contiguous=True)
    share = share.select_columns([name for name in ROW_FEATURES if name in share.column_names])
    if num_proc is None:
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        num_proc = min(num_cores, len(share) // ROWS_PER_PROCESS)
    return check_blocks(share.with_format("arrow"), checker, max(num_proc, 1))


def mark_supervised(processor, row: dict) -> str:
    """Return a row as the model reads it, one image token per image, with its supervised part between ⟦ and ⟧."""
    input_ids, supervised = encode_conversation(processor, row["messages"], row.get("num_context_messages") or 0)
    changes = np.flatnonzero(supervised[1:] != supervised[:-1]) + 1
    runs = zip(np.split(input_ids, changes), np.split(supervised, changes), strict=True)
    return "".join(
        f"⟦{processor.tokenizer.decode(ids)}⟧" if marked[0] else processor.tokenizer.decode(ids)
        for ids, marked in runs
    )


def checked_stream(
    dataset: IterableDataset, processor, max_length: int | None = None, bad_rows: str = "raise"
) -> IterableDataset:
    r"""
    Check each row of a stream when it is read. Images are decoded a second time for the check.

    Args:
        dataset ([`~datasets.IterableDataset`]): rows of [`load_rows`], not shuffled.
        processor ([`VTLMMProcessor`])
        max_length (`int`, *optional*): longest valid row in tokens.
        bad_rows (`str`, *optional*, defaults to `"raise"`): or `"skip"`, with a warning for each invalid row.

    Raises:
        `ValueError`: at the first invalid row.
    """
    checker, num_shards = RowChecker(processor, max_length), dataset.num_shards

    def keep_good(batch: dict, indices: list[int]) -> dict:
        row, index = {name: values[0] for name, values in batch.items()}, indices[0]
        problems = [Problem(index, **problem) for problem in checker(row)["problems"]]
        if not problems:
            return batch
        text = "; ".join(f"{problem}. Fix: {problem.fix}" for problem in problems) + f". This is {describe_row(row)}."
        if num_shards > 1:
            text += " (With several files, each worker counts the rows that it reads.)"
        if bad_rows == "raise":
            raise ValueError(f"Invalid row in the stream: {text} Set `bad_rows: skip` to train on the other rows.")
        warnings.warn(f"Skipped an invalid row of the stream: {text}")
        return {name: [] for name in batch}

    # `filter` would not decode the images: a stream decodes only in the first operation that knows its features
    rows = dataset.decode(False).map(keep_good, with_indices=True, batched=True, batch_size=1)
    return rows.cast(Features({**(dataset.features or {}), **ROW_FEATURES}))
