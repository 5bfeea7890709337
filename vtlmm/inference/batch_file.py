# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Answer the questions of a dataset into a file; an interrupted run resumes."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from PIL import Image

from vtlmm.data.encoding import position_limit
from vtlmm.data.images import image_key, open_image
from vtlmm.data.output_files import one_writer, require_other_place
from vtlmm.data.questions import split_questions
from vtlmm.data.rows import load_rows, undecoded_images
from vtlmm.data.setting_values import require_batch_size, require_integers
from vtlmm.data.validation import check_rows

from .resumable import answer_all, digest, open_run, run_key


def answer_file(
    model,
    processor,
    dataset: str | os.PathLike,
    output: str | os.PathLike,
    *,
    image_folder: str | os.PathLike | None = None,
    columns: Mapping[str, Any] | None = None,
    batch_size: int | Literal["auto"] = 8,
    max_new_tokens: int = 512,
    name: str | None = None,
) -> list[str]:
    r"""
    Answer the questions of a dataset greedily into a file of JSON lines.

    Each line has the `index` of its question, the question, its images, the `answer` and its `probability`. Questions
    about the same images and questions of similar length are answered together, so the lines are not in order. All
    rows and images are checked before the first answer. The same call resumes an interrupted run. The file
    `OUTPUT.run.json` next to the output identifies the run.

    Args:
        model, processor: see [`load_model`].
        dataset (`str`): file, folder or Hub id, with or without answers, see [`load_rows`].
        output (`str`): the file of answers.
        image_folder (`str`, *optional*): folder of the image paths; by default the folder of the dataset.
        columns (`dict`, *optional*): names of the dataset's columns, see [`load_rows`].
        batch_size (`int` or `"auto"`, *optional*, defaults to 8): questions per forward pass, see [`answer_all`].
        max_new_tokens (`int`, *optional*, defaults to 512): longest answer in tokens.
        name (`str`, *optional*): name of the model in `OUTPUT.run.json`.

    Returns:
        `list[str]`: the answers, in the order of the questions.

    Raises:
        `ValueError`: for invalid rows or images, an `output` with answers of another model, other questions, images or
            settings, or another process that writes to `output`.
        `FileNotFoundError`: for a dataset or image file that does not exist.
    """
    require_other_place(output, dataset=dataset)
    require_integers(max_new_tokens=max_new_tokens)
    require_batch_size(batch_size)
    output = Path(output)
    rows = undecoded_images(
        load_rows(dataset, image_folder=image_folder, columns=columns, require_answers=False, keep_columns=["id"])
    )
    limit = position_limit(model.config)
    report = check_rows(rows, processor, require_answers=False, require_marks=False, max_positions=limit)
    report.raise_for_problems(advice=f"Fix these rows of {dataset}. No question was answered.")
    questions, load_image = read_file_questions(rows, dataset, image_folder)
    names = dict.fromkeys(name for question in questions for name in question["images"])
    images = [image_key(load_image(name)) for name in names]
    key = run_key(model, processor, questions, max_new_tokens=max_new_tokens) | {"images": digest(images)}
    about = {"model": name or model.name_or_path, "num_questions": len(questions)}
    with one_writer(output.with_name(f".{output.name}.lock"), output):
        open_run(output.with_name(f"{output.name}.run.json"), [output], key, about)
        records = answer_all(output, model, processor, questions, load_image, batch_size, max_new_tokens)
    return [record["answer"] for record in records]


def read_file_questions(
    rows: Dataset, dataset: str | os.PathLike, image_folder: str | os.PathLike | None = None
) -> tuple[list[dict[str, Any]], Callable[[str], Image.Image]]:
    """Return the questions of rows, whose `images` are names, and a function that opens the image of a name."""
    folder = os.path.abspath(image_folder or (dataset if os.path.isdir(dataset) else os.path.dirname(dataset)))
    image_positions: dict[str, tuple[int, int]] = {}

    def image_name(image: dict, index: int, position: int) -> str:
        is_file = image["bytes"] is None
        name = os.path.relpath(image["path"], folder) if is_file else f"row {index}, image {position}"
        image_positions.setdefault(name, (index, position))
        return name

    questions: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        names = [image_name(image, index, position) for position, image in enumerate(row["images"])]
        row_id = json.loads(row["id"])
        for question in split_questions([{**row, "images": names}], unanswered=True):
            # without the ground truth: `vtlmm eval` scores answers
            kept: dict[str, Any] = {key: value for key, value in question.items() if key != "answer"}
            questions.append({**kept, "row": index, **({} if row_id is None else {"id": row_id})})
    if not questions:
        raise ValueError(f"{dataset} has no rows with a question.")

    def load_image(name: str) -> Image.Image:
        index, position = image_positions[name]
        return open_image(rows[index]["images"][position])

    return questions, load_image
