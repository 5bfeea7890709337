# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Load rows for training, evaluation and questions from files, folders, the Hub and datasets in memory."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.features.features import require_decoding
from datasets.fingerprint import Hasher

from .arrow_rows import ROWS_PER_BATCH, ROWS_PER_TABLE, python_rows
from .columns import check_columns, mapped_columns
from .formats import convert_row
from .questions import split_row
from .row_tables import RowColumns, row_tables
from .setting_values import require_integers
from .sources import (
    file_format,
    folder_files,
    load_table,
    read_file,
    require_source,
    stream_dataset,
    tables_dataset,
    text_pairs,
)


ROW_FEATURES = Features(
    {
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(Image()),
        "num_context_messages": Value("int64"),
    }
)


def load_rows(
    dataset: str | os.PathLike | Dataset | IterableDataset | list[dict],
    *,
    image_folder: str | os.PathLike | None = None,
    split: str = "train",
    config_name: str | None = None,
    streaming: bool = False,
    columns: Mapping[str, Any] | None = None,
    keep_columns: Sequence[str] = (),
    max_rows: int | None = None,
    one_question_per_row: bool = False,
    require_answers: bool = True,
) -> Dataset | IterableDataset:
    r"""
    Load the rows of one split, in order, with the columns of `ROW_FEATURES`. No image is decoded.

    - `messages`: `role` and `content`, a list of `{"type", "text"}`. `text` is None for an image and for a value that
      is not a string. An `<image>` in a text becomes an image part in its place. A row with images and without
      `<image>` has the images at the start of the first question.
    - `images`: decoded when a row is read; empty for a row without images.
    - `num_context_messages`: answers among the first `num_context_messages` messages are not supervised.

    Args:
        dataset: a file (JSON, JSON lines, parquet, CSV, TSV, WebDataset tar; JSON and CSV also compressed), a folder
            (of images with metadata or `.txt` captions, of tar files, or from `save_to_disk`), a Hub dataset id, a
            dataset from `datasets`, or a list of rows, in a format of [`convert_row`].
        image_folder: folder that relative image paths start from. Default: the folder of the file.
        split (`str`): split, or a slice of a split such as `"train[:2000]"`. A file has the split `train` only.
        config_name (`str`): configuration of a Hub dataset.
        streaming (`bool`): return an [`~datasets.IterableDataset`] that reads rows when they are used.
        columns (`dict`): name of a supported column → name of your column, `{"image": "photo", "question": "ask"}`.
            `images` also accepts a list of names. `{"photo": None}` ignores a column.
        keep_columns: columns of the dataset to keep, as JSON texts (`null` if a row does not have the column).
        max_rows (`int`): read at most this number of rows.
        one_question_per_row (`bool`): split conversations as [`split_questions`] does.
        require_answers (`bool`): False also accepts questions without answers. Such a row ends with the user's
            message.

    Raises:
        `ValueError`: if a row matches no format, has images or texts that would be ignored, or a file cannot be read.
        `FileNotFoundError`: if the file, or `image_folder`, does not exist.
    """
    check_columns(columns)
    require_integers(max_rows=max_rows)
    if image_folder is not None and not os.path.isdir(image_folder):
        raise FileNotFoundError(f"image_folder {os.fspath(image_folder)!r} is not an existing folder.")
    options: dict[str, Any] = {
        "columns": dict(columns or {}),
        "keep_columns": tuple(keep_columns),
        "require_answers": require_answers,
    }
    if isinstance(dataset, str | os.PathLike):
        rows = _load_source(os.fspath(dataset), image_folder, split, config_name, streaming, options, max_rows)
    else:
        rows = _rows_in_memory(dataset, os.path.abspath(image_folder or os.curdir), options, max_rows)
    return _one_question_per_row(rows) if one_question_per_row else rows


def row_features(keep_columns: Sequence[str] = ()) -> Features:
    """Return `ROW_FEATURES` with text columns for `keep_columns`."""
    return Features({**ROW_FEATURES, **{name: Value("string") for name in keep_columns}})


def first_rows(dataset, max_rows: int | None):
    """Return the first `max_rows` rows of a dataset or stream, all rows for None."""
    if max_rows is None:
        return dataset
    return dataset.take(max_rows if isinstance(dataset, IterableDataset) else min(max_rows, len(dataset)))


def _load_source(name: str, image_folder, split: str, config_name, streaming: bool, options: dict, max_rows):
    """Load the rows of a file, a folder or a Hub dataset."""
    is_local, path = require_source(name), Path(name)
    folder = image_folder or (path if path.is_dir() else path.parent if is_local else None)
    folder = None if folder is None else os.path.abspath(folder)
    files = folder_files(path) if path.is_dir() else [path] if is_local else None
    if files is not None and file_format(files[0])[0] != ".parquet":
        arguments = {"files": [str(file) for file in files], "folder": folder, "options": options}
        state = [(file.resolve(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        features = row_features(options["keep_columns"])
        try:
            if streaming:
                rows = stream_dataset(_file_rows, features, arguments, split, name)
            else:
                fingerprint = _fingerprint(state, folder, options)
                rows = tables_dataset(_file_tables, features, arguments, split, name, fingerprint)
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, ValueError | OSError):
                raise error.__cause__ from None
            raise
        return first_rows(rows, max_rows)
    pairs = text_pairs(path) if path.is_dir() and not any(path.glob("metadata.*")) else None
    if pairs is not None:
        converted = list(_list_rows(pairs[:max_rows], name, folder, options))
        return Dataset.from_list(converted, features=row_features(options["keep_columns"]))
    table = load_table(name, is_local, split, config_name, streaming)
    return convert_dataset(first_rows(table, max_rows), name, folder, **options)


def _rows_in_memory(dataset, folder: str, options: dict, max_rows: int | None) -> Dataset | IterableDataset:
    """Convert a list of rows or a dataset."""
    if isinstance(dataset, list):
        converted = list(_list_rows(dataset, "The list of rows", folder, options))
        if not converted:
            raise ValueError("The list of rows is empty.")
        rows = Dataset.from_list(converted, features=row_features(options["keep_columns"]))
        return first_rows(rows, max_rows)
    return convert_dataset(first_rows(dataset, max_rows), "The dataset", folder, **options)


def _file_rows(files: list[str], folder: str, options: dict) -> Iterator[dict]:
    _require_columns(files, folder, options)
    for file in files:
        yield from _list_rows(read_file(file, folder), file, folder, options)


def _file_tables(files: list[str], folder: str, options: dict) -> Iterator[pa.Table]:
    _require_columns(files, folder, options)
    features = row_features(options["keep_columns"])
    for file in files:
        yield from row_tables(read_file(file, folder), features, file, folder, options, ROWS_PER_TABLE)


def _require_columns(files: list[str], folder: str, options: dict) -> None:
    """Raise a `ValueError` if `columns` names a column that no row has."""
    missing = mapped_columns(options["columns"])
    for file in files:
        for row in read_file(file, folder) if missing else ():
            missing -= row.keys() if isinstance(row, dict) else set()
            if not missing:
                break
    if missing:
        raise ValueError(f"{', '.join(files)} has no column {sorted(missing)}, which `columns` names.")


def _list_rows(rows, source: str, folder: str | None, options: dict) -> Iterator[dict]:
    for index, row in enumerate(rows):
        yield from convert_row(row, index, source, folder, **options)


def _fingerprint(*state: Any) -> str:
    """Return the name of the cache of converted rows. It changes with the code in this folder: `datasets` identifies
    functions by their name only, and would reuse rows of an older version."""
    code = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    return Hasher.hash([*code, *map(str, state)])


# ---- Tables ----


def convert_dataset(
    dataset,
    source: str,
    folder: str | None = None,
    columns: Mapping[str, Any] | None = None,
    keep_columns: Sequence[str] = (),
    require_answers: bool = True,
):
    """
    Return the rows of a `Dataset` or `IterableDataset` with the columns of `ROW_FEATURES`; see [`convert_row`].

    Raises:
        `ValueError`: if `columns` names a column that the dataset does not have, and see [`convert_row`].
    """
    names = dataset.column_names or list(next(iter(dataset.take(1)), {}))
    missing = mapped_columns(columns or {}) - set(names)
    if missing:
        raise ValueError(f"{source} has no column {sorted(missing)}, which `columns` names. It has {names}.")
    options = {"columns": dict(columns or {}), "keep_columns": tuple(keep_columns), "require_answers": require_answers}
    features = row_features(keep_columns)
    arguments: dict[str, Any] = {
        "with_indices": True,
        "batched": True,
        "batch_size": ROWS_PER_BATCH,
        "fn_kwargs": {"source": source, "folder": folder, "options": options},
        "remove_columns": names,
    }
    if isinstance(dataset, IterableDataset):
        dataset = dataset if dataset.features is None else dataset.decode(False)
        # A stream decodes images in the first operation that knows its features, which must not be `map`
        return dataset.map(_convert_batch, **arguments).select_columns(list(features)).cast(features)
    fingerprint = _fingerprint(dataset._fingerprint, source, folder, options)
    dataset = undecoded_images(dataset)
    if not any(require_decoding(feature) for feature in dataset.features.values()):
        dataset = dataset.with_format("arrow")
    rows = dataset.map(
        _convert_batch,
        features=features,
        new_fingerprint=fingerprint,
        desc=f"Reading {source}",
        writer_batch_size=ROWS_PER_TABLE,
        **arguments,
    )
    return rows.with_format(None)


def _convert_batch(batch, indices: list[int], source: str, folder: str | None, options: dict):
    """Return converted rows as a table for a table, else as a dict of lists."""
    features = row_features(options["keep_columns"])
    if isinstance(batch, pa.Table):
        columns = RowColumns(features, source, folder, options)
        for row, index in zip(python_rows(batch), indices, strict=True):
            columns.add(row, index)
        return columns.table()
    converted = [
        new
        for row, index in zip(_rows(batch), indices, strict=True)
        for new in convert_row(row, index, source, folder, **options)
    ]
    return {name: [row[name] for row in converted] for name in features}


def _rows(batch: dict) -> list[dict]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def undecoded_images(dataset: Dataset) -> Dataset:
    """Return a dataset whose images are `{"path", "bytes"}`, in nested columns too."""

    def undecoded(feature: Any) -> Any:
        if isinstance(feature, Image):
            return Image(decode=False)
        if isinstance(feature, List):
            return List(undecoded(feature.feature), length=feature.length)
        if isinstance(feature, dict):
            return {name: undecoded(value) for name, value in feature.items()}
        return feature

    for name, feature in dataset.features.items():
        if undecoded(feature) != feature:
            dataset = dataset.cast_column(name, undecoded(feature))
    return dataset


# ---- Conversations as questions ----


def _one_question_per_row(dataset):
    if isinstance(dataset, IterableDataset):
        return dataset.decode(False).map(_split_batch, batched=True).cast(dataset.features)
    return undecoded_images(dataset).map(
        _split_batch,
        batched=True,
        features=dataset.features,
        new_fingerprint=_fingerprint(dataset._fingerprint),
        desc="One question per row",
    )


def _split_batch(batch: dict) -> dict:
    rows = [new for row in _rows(batch) for new in split_row(row)]
    return {name: [row[name] for row in rows] for name in batch}
