# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Find out what a dataset name is (a local file, a local folder or a Hub id) and read its rows unconverted."""

import csv
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, DatasetDict, IterableDataset, ReadInstruction, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError

from .annotation_files import annotation_rows, caption_lines, parse_json
from .arrow_rows import cached_rows
from .image_values import IMAGE_SUFFIXES


COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zip": "zip"}
JSON_LINES = (".jsonl", ".ndjson")
DATA_SUFFIXES = (".json", *JSON_LINES, ".parquet", ".csv", ".tsv", ".token", ".tar", ".tgz")
SUPPORTED_FILES = "JSON, JSON lines, parquet, CSV, TSV and WebDataset tar files"
CHUNK_SIZE = 2**20  # characters of a JSON file that are read at once
JSON_SPACES = re.compile(r"[ \t\n\r]*")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def file_format(path: str | os.PathLike) -> tuple[str, str | None]:
    """Return the lower-case suffix of a file, and its compression: `rows.JSONL.gz` is (`.jsonl`, `gzip`)."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1:] in ([".gz"], [".bz2"], [".xz"]) and suffixes[-2:-1] == [".tar"]:
        return ".tar", None  # tarfile recognizes the compression
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return "".join(suffixes[-2:-1]), COMPRESSIONS[suffixes[-1]]
    return "".join(suffixes[-1:]), None


def require_source(name: str) -> bool:
    """
    Return whether `name` is local. A local path is never looked up on the Hub.

    Raises:
        `FileNotFoundError`: if `name` is a path, not a Hub id, and does not exist.
        `ValueError`: for a file in an unsupported format.
    """
    path = Path(name)
    if os.path.exists(name):
        if path.is_file() and file_format(name)[0] not in DATA_SUFFIXES:
            raise ValueError(f"{name}: files of this type are not supported. Supported: {SUPPORTED_FILES}.")
        return True
    is_path = not HUB_ID.fullmatch(name) or name.startswith(".") or file_format(name)[0] in DATA_SUFFIXES
    parent = path.parent
    if is_path or (str(parent) != "." and parent.is_dir()):
        folder = next((folder for folder in path.absolute().parents if folder.is_dir()), path.anchor)
        text = f"{name}: the file or folder does not exist."
        if os.path.abspath(parent) != str(folder):
            text += f" The last folder of the path that exists is {folder}."
        raise FileNotFoundError(text)
    return False


# ---- Files that Python reads: Arrow needs one type per column, and these files mix types ----


def read_file(path: str, folder: str) -> Iterator[Any]:
    r"""
    Yield the rows of a JSON, JSON lines, CSV, TSV, Flickr token or WebDataset tar file.

    Args:
        path (`str`): may be compressed. Text is UTF-8, UTF-16 or UTF-32, with or without a byte order mark.
        folder (`str`): folder of the images that COCO's, VQA's and Visual Genome's files name by number.

    Raises:
        `ValueError`: naming the file and line that cannot be read.
    """
    suffix, _ = file_format(path)
    if suffix in (".tar", ".tgz"):
        yield from _tar_rows(path)
    elif suffix == ".json":
        yield from _json_rows(path, folder)
    elif suffix in JSON_LINES:
        with _open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
                    yield from annotation_rows([row], Path(path), folder, _load_json)
    elif suffix == ".token":
        with _open_text(path) as lines:
            yield from caption_lines(iter(lines), Path(path))
    else:
        yield from _csv_rows(path, suffix)


def _load_json(path: Path) -> Any:
    with _open_text(str(path)) as file:
        return parse_json(file.read(), path)


class _NotOneListError(Exception):
    """A JSON file is not valid, or is not one list."""


def _json_rows(path: str, folder: str) -> Iterator[Any]:
    """Yield the rows of a JSON file. A list is read in parts, so that memory does not grow with the file."""
    file, is_empty = Path(path), True
    try:
        with _open_text(path) as text:
            for row in _list_items(text):
                is_empty = False
                yield from annotation_rows([row], file, folder, _load_json)
        return
    except _NotOneListError:
        content = _load_json(file)  # raises the error of an invalid file
    if not is_empty:
        raise ValueError(f"{path} must hold one list of rows.")
    yield from annotation_rows(content, file, folder, _load_json)


def _list_items(text: "_Text") -> Iterator[Any]:
    """Yield the items of the JSON list in a file."""
    decode, spaces = json.JSONDecoder().raw_decode, " \t\n\r"
    buffer = more = text.read(CHUNK_SIZE)
    while more and not buffer.strip(spaces):
        buffer = more = text.read(CHUNK_SIZE)
    position = _skip_spaces(buffer, 0)
    is_first, mark = True, buffer[position : position + 1]
    if mark != "[":
        raise _NotOneListError
    while mark != "]":
        start = _skip_spaces(buffer, position + 1)
        if is_first and buffer[start : start + 1] == "]":
            position = start
            break
        try:
            item, end = decode(buffer, start)
            end = _skip_spaces(buffer, end)
            is_complete = buffer[end : end + 1] in (",", "]")  # otherwise a number may continue in the next part
        except ValueError:
            is_complete = False
        if is_complete:
            is_first, mark, position = False, buffer[end], end
            yield item
            continue
        more = text.read(max(CHUNK_SIZE, len(buffer) - position))
        if not more:
            raise _NotOneListError
        buffer, position = buffer[position:] + more, 0
    if (buffer[position + 1 :] + text.read()).strip(spaces):
        raise _NotOneListError


def _skip_spaces(text: str, position: int) -> int:
    match = JSON_SPACES.match(text, position)
    return match.end() if match else position


class _Text:
    """A text file in the encoding that its first bytes show; an invalid byte is an error that names the file."""

    def __init__(self, path: str):
        self.path = path
        compression = file_format(path)[1]
        with fsspec.open(path, "rb", compression=compression) as file:
            start = file.read(4)
        encoding = json.detect_encoding(start) if start else "utf-8"
        self.file = fsspec.open(path, "rt", compression=compression, encoding=encoding, newline="").open()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __iter__(self):
        try:
            yield from self.file
        except UnicodeDecodeError as error:
            raise self._invalid(error) from error

    def read(self, size: int = -1) -> str:
        try:
            return self.file.read(size)
        except UnicodeDecodeError as error:
            raise self._invalid(error) from error

    def _invalid(self, error: UnicodeDecodeError) -> ValueError:
        byte = error.object[error.start : error.start + 1].hex()
        return ValueError(f"{self.path} is not UTF-8 (byte 0x{byte}). Save the file as UTF-8.")


def _open_text(path: str) -> _Text:
    return _Text(path)


def _csv_rows(path: str, suffix: str) -> Iterator[dict]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # base64 images are longer than the default
    with _open_text(path) as lines:
        text = iter(lines)
        header = next(text, "").lstrip("\ufeff")
        delimiter = "\t" if suffix == ".tsv" else max(",;\t|", key=header.count)

        def with_header() -> Iterator[str]:
            yield header
            yield from text

        reader = csv.DictReader(with_header(), delimiter=delimiter, skipinitialspace=True)
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {reader.line_num} has more fields than the header. Quote the field.")
            yield {key.strip(): value for key, value in row.items() if value not in ("", None)}


def _tar_rows(path: str) -> Iterator[dict]:
    """WebDataset: the files of one sample have the same name up to the first dot, and follow each other."""
    with tarfile.open(path, "r:*") as archive:
        name: str | None = None
        sample: dict[str, bytes] = {}
        for member in archive:
            if not member.isfile():
                continue
            folder, base = os.path.split(member.name)
            key, _, suffix = base.partition(".")
            if sample and os.path.join(folder, key) != name:
                yield _tar_row(sample, path)
                sample = {}
            name = os.path.join(folder, key)
            content = archive.extractfile(member)
            sample[suffix.lower()] = content.read() if content else b""
        if sample:
            yield _tar_row(sample, path)


def _tar_row(sample: dict[str, bytes], path: str) -> dict:
    images: list[bytes] = []
    row: dict[str, Any] = {}
    for suffix, content in sample.items():
        if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES:
            images.append(content)
        elif suffix == "json":
            row |= parse_json(content.decode(json.detect_encoding(content)), Path(path))
        elif suffix in ("txt", "text", "caption"):
            row.setdefault("caption", content.decode("utf-8-sig").strip())
        else:
            raise ValueError(f"{path}: a sample has a file `.{suffix}`. Supported: images, .json and .txt.")
    if images:  # the paths in the JSON file name the images of the sample
        row.pop("images", None)
        row["image"] = images
    return row


# ---- Folders and the Hub ----


def folder_files(path: Path) -> list[Path] | None:
    """
    Return the files of a folder that [`read_file`] reads, None if `datasets` reads the folder.

    A folder of tar files, and a folder with one JSON or CSV file and no metadata, are read by [`read_file`].
    """
    names = [file for file in sorted(path.iterdir()) if file.is_file()]
    tars = [file for file in names if file_format(file)[0] in (".tar", ".tgz")]
    if tars:
        return tars
    data = [file for file in names if file_format(file)[0] in DATA_SUFFIXES]
    described = any(file.name.lower() == "readme.md" or file.stem.lower() == "metadata" for file in names)
    is_saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if len(data) != 1 or described or is_saved or file_format(data[0])[0] == ".parquet":
        return None
    return data


def text_pairs(path: Path) -> list[dict] | None:
    """Return a row for each image of a folder with a `.txt` file of the same name, None if there is no such image."""
    images = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES]
    pairs = [(image, image.with_suffix(".txt")) for image in images]
    missing = [image for image, text in pairs if not text.is_file()]
    if not images or len(missing) == len(images):
        return None
    if missing:
        raise ValueError(f"{missing[0]} has no text file {missing[0].with_suffix('.txt').name} next to it.")
    return [{"image": str(image), "text": text.read_text("utf-8-sig").strip()} for image, text in pairs]


def load_table(name: str, is_local: bool, split: str, config_name: str | None, streaming: bool):
    """
    Load a parquet file, a folder or a Hub dataset with `datasets`.

    Raises:
        `ValueError`: if the dataset cannot be loaded.
    """
    path = Path(name)
    if is_local and path.is_dir() and any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        saved = load_from_disk(name)
        splits = saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
        rows = select_split(splits, split, name)
        return rows.to_iterable_dataset() if streaming else rows
    arguments: dict[str, Any] = {"path": name, "name": config_name}
    if is_local and path.is_file():
        arguments = {"path": "parquet", "data_files": name}
    try:
        return load_dataset(**arguments, split=split, streaming=streaming)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        if is_local:
            raise ValueError(f"{name}: the folder has no dataset. Supported: {SUPPORTED_FILES}, or images.") from error
        raise ValueError(
            f"{name!r} is not a local file or folder, and was not found on the Hub: {str(error).splitlines()[0]}"
        ) from error


def select_split(splits: dict[str, Dataset], split: str, name: str) -> Dataset:
    """
    Return a split, or a slice of a split such as `"train[:10]"`.

    Raises:
        `ValueError`: if the split does not exist.
    """
    if re.split(r"\W", split)[0] not in splits:
        raise ValueError(f"{name} has no split {split!r}. It has {sorted(splits)}.")
    [part] = ReadInstruction.from_spec(split).to_absolute({key: len(rows) for key, rows in splits.items()})
    rows = splits[part.splitname]
    return rows.select(range(part.from_ or 0, len(rows) if part.to is None else part.to))


def stream_dataset(generate: Callable, features, arguments: dict, split: str, name: str) -> IterableDataset:
    """Return a stream of generated rows."""
    if split != "train":
        raise ValueError(f"{name}: a stream of this file has the split train only, not {split!r}.")
    return IterableDataset.from_generator(generate, features=features, gen_kwargs=arguments)


def tables_dataset(generate: Callable, features, arguments: dict, split: str, name: str, fingerprint: str) -> Dataset:
    """Return the split of a dataset whose rows come from a generator of tables."""
    rows = cached_rows(generate, features, arguments, fingerprint)
    if not len(rows):
        raise ValueError(f"{name} has no rows.")
    return select_split({"train": rows}, split, name)
