# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Questions without known answers: rows of a file, answered into a file that a stopped run goes on with."""

import io
import json
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, Image, List
from tqdm.auto import tqdm

from vtlmm.data.images import image_key, open_image

from .resumable import answer_all, digest, open_run, run_key


def read_rows(path: Path, image_folder: str | None = None) -> tuple[list[dict], Callable]:
    r"""
    The questions of a file, and the function that gives the image from PIL of a key in their `images`.

    Args:
        path (`Path`): `.json` (a list), `.jsonl` or `.parquet` with `question`, and `image` or `images`, each a path
            or, in a parquet file, the bytes; an `id` is kept.
        image_folder (`str`, *optional*): where relative paths start; by default beside the file.

    Raises:
        `ValueError`: naming the row that has no question or names a image that is not there.
        `FileNotFoundError`: without the file.
    """
    folder = Path(image_folder or path.parent)
    questions, embedded = [], {}
    rows = _read_table(path)
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise ValueError(f"{path}, row {index} has no text in `question`.")
        images, keys = row.get("images") or row.get("image") or [], []
        for position, image in enumerate(images if isinstance(images, list) else [images]):
            key = image.get("path") if isinstance(image, dict) else image
            if isinstance(image, bytes) or (isinstance(image, dict) and image.get("bytes") is not None):
                key = f"row {index}, image {position}"
                embedded[key] = (index, position)
            elif not isinstance(key, str) or not (folder / key).is_file():
                raise ValueError(f"{path}, row {index}: there is no image {key!r} in {folder}.")
            keys.append(key)
        named = {"id": row["id"]} if row.get("id") is not None else {}
        questions.append({"images": keys, "question": row["question"], **named})
    if not questions:
        raise ValueError(f"{path} has no rows.")

    def load_image(key: str):
        if key not in embedded:
            return open_image(folder / key)
        index, position = embedded[key]
        images = rows[index].get("images") or rows[index]["image"]
        image = images[position] if isinstance(images, list) else images
        try:
            return open_image(io.BytesIO(image if isinstance(image, bytes) else image["bytes"]))
        except ValueError as error:
            raise ValueError(f"{path}, {key} is none that can be read.") from error

    return questions, load_image


def _read_table(path: Path):
    """The rows; those of a parquet file stay on the disk, with their images undecoded."""
    if path.suffix == ".parquet":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file.")
        rows = Dataset.from_parquet(str(path))
        for name, feature in rows.features.items():
            if isinstance(feature, Image):
                rows = rows.cast_column(name, Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), Image):
                rows = rows.cast_column(name, List(Image(decode=False)))
        return rows
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return [_read_line(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. With one record a line, name it .jsonl.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of records, not a {type(rows).__name__}.")
    return rows


def _read_line(path: Path, number: int, line: str):
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error


def answer_rows(
    output: Path,
    model,
    processor,
    questions: list[dict],
    load_image,
    batch_size: int,
    max_new_tokens: int,
    name: str,
) -> list[str]:
    r"""
    Greedy answers in the order of `questions`, appended to the file `output` batch by batch, shortest question first;
    `index` says whose an answer is. Beside it `.run.json` says which model, images and settings they are of.

    Every image is opened once before the first answer, so that a broken one stops nothing half-way.

    Raises:
        `ValueError`: for a image that cannot be read; when `output` holds answers of another model, of other
            images, questions or settings.
    """
    names = dict.fromkeys(name for question in questions for name in question["images"])
    images = [image_key(load_image(name)) for name in tqdm(names, desc="opening images", leave=False)]
    key = run_key(model, processor, questions, max_new_tokens=max_new_tokens) | {"images": digest(images)}
    open_run(output.with_suffix(".run.json"), [output], key, {"model": name, "num_questions": len(questions)})
    return answer_all(output, model, processor, questions, load_image, batch_size, max_new_tokens)
