# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Convert nested Arrow columns to Python values and back, many rows at a time, and cache rows as Arrow files."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.builder import Key


ROWS_PER_BATCH = 1000
# Rows of a part of a cache file. To open a file reads from the disk at each part.
ROWS_PER_TABLE = 10_000


def python_values(array: pa.Array | pa.ChunkedArray) -> list:
    """Return `array.to_pylist()`. Lists and structs are built from whole columns, which is faster."""
    values: list[Any]
    if isinstance(array, pa.ChunkedArray):
        return [value for chunk in array.chunks for value in python_values(chunk)]
    if pa.types.is_list(array.type):
        ends = array.offsets.to_numpy().tolist()
        first = ends[0]
        items = python_values(array.values.slice(first, ends[-1] - first))
        values = [items[start - first : end - first] for start, end in zip(ends, ends[1:], strict=False)]
    elif pa.types.is_struct(array.type):
        names = [child.name for child in array.type]
        columns = [python_values(child) for child in array.flatten()]
        values = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)] if columns else []
        values = values or [{} for _ in range(len(array))]
    elif pa.types.is_string(array.type) or pa.types.is_boolean(array.type):
        return array.to_numpy(zero_copy_only=False).tolist()
    else:
        return array.to_pylist()
    if array.null_count:
        nulls = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))
        for position in nulls.tolist():
            values[position] = None
    return values


def python_rows(table: pa.Table) -> list[dict]:
    """Return the rows of a table as dicts, see [`python_values`]."""
    columns = [python_values(column) for column in table.columns]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def rows_table(rows: list[dict], features: datasets.Features) -> pa.Table:
    """Return rows of [`convert_row`] as a table with the columns of `features`."""
    schema = features.arrow_schema
    return pa.table([pa.array([row[c.name] for row in rows], type=c.type) for c in schema], schema=schema)


def batches(rows: Iterable[dict], size: int = ROWS_PER_BATCH) -> Iterator[list[dict]]:
    """Yield lists of `size` rows."""
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


@dataclass
class RowsConfig(datasets.BuilderConfig):
    """Arguments of [`RowsBuilder`]: a generator of tables, its arguments, and the columns."""

    generate: Callable = iter
    arguments: dict[str, Any] = field(default_factory=dict)
    features: datasets.Features | None = None


class RowsBuilder(datasets.ArrowBasedBuilder):
    """
    Write generated tables to an Arrow file in the cache of `datasets`.

    [`~datasets.Dataset.from_generator`] does the same, but it encodes each value of each row in Python.
    """

    BUILDER_CONFIG_CLASS = RowsConfig
    DEFAULT_WRITER_BATCH_SIZE = ROWS_PER_TABLE
    config: RowsConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.config.features)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name="train")]

    def _generate_tables(self) -> Iterator[tuple[Key, pa.Table]]:
        for number, table in enumerate(self.config.generate(**self.config.arguments)):
            yield Key(0, number), table


def cached_rows(
    generate: Callable, features: datasets.Features, arguments: dict, fingerprint: str
) -> datasets.Dataset:
    """
    Return the rows of generated tables from the cache of `datasets`. The tables are generated if `fingerprint` is not
    in the cache.

    Raises:
        [`~datasets.exceptions.DatasetGenerationError`]: if the generator raises an error.
    """
    builder = RowsBuilder(
        config_id=f"default-fingerprint={fingerprint}",
        generate=generate,
        arguments=arguments,
        features=features,
    )
    builder.download_and_prepare()
    if not builder.info.splits["train"].num_examples:  # `as_dataset` raises an error for a split without rows
        return datasets.Dataset(rows_table([], features))
    rows = builder.as_dataset(split="train")
    rows._fingerprint = fingerprint
    return rows
