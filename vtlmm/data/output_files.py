# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Write output files: completely or not at all, valid JSON, and one writer at a time."""

import csv
import json
import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@contextmanager
def one_writer(lock: str | os.PathLike, output: str | os.PathLike) -> Iterator[None]:
    """
    Hold a lock file, so that one process at a time writes to `output`. A thread that holds it may take it again.

    The system releases the lock when the process ends, also after SIGKILL: the file itself means nothing.

    Raises:
        `ValueError`: if another process holds the lock.
    """
    path = Path(lock)
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    file_lock = FileLock(path, is_singleton=True)
    try:
        file_lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"Another process is writing to {os.fspath(output)}{f' ({owner})' if owner else ''}. Wait until it ends, "
            "or choose another output."
        ) from error
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        file_lock.release()


def require_other_place(output: str | os.PathLike | None, **inputs: Any) -> None:
    """
    Check that an output is not an input of the same call. Inputs that are not paths are ignored.

    Raises:
        `ValueError`: naming the input.
    """
    for name, value in inputs.items():
        if output is None or not isinstance(value, str | os.PathLike) or not os.path.exists(value):
            continue
        if os.path.realpath(value) == os.path.realpath(output):
            raise ValueError(f"The output {os.fspath(output)} is also the input `{name}`. Choose another output.")


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """
    Give a temporary path, and rename it to `path` at the end of the `with` block.

    A reader sees the old file or the new file, never a part. After an error, the temporary file is deleted.
    """
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield draft
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically, see [`atomic_path`]. Creates its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Write a value as JSON atomically. NaN and infinity, which JSON does not have, become `null`."""
    write_text(path, json_text(value, indent=indent) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON, with `null` in place of NaN and infinity."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def finite(value: Any) -> Any:
    """Return a copy of a JSON value with None in place of NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_csv(path: str | os.PathLike, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically. A text that a spreadsheet would run as a formula starts with an apostrophe."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([csv_cell(name) for name in header])
        writer.writerows([csv_cell(cell) for cell in row] for row in rows)


def csv_cell(value: Any) -> Any:
    """Return a cell that a spreadsheet does not run as a formula. Numbers do not change."""
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return finite(value)
