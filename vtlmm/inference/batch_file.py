# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Answer a file of questions; resumable."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

from vtlmm.data.images import image_key, open_image
from vtlmm.data.questions import split_questions
from vtlmm.data.rows import load_rows, undecoded_images

from .resumable import answer_all, digest, open_run, run_key


def load_questions(
    dataset: str | Path, image_folder: str | Path | None = None
) -> tuple[list[dict], Callable[[str], Image.Image]]:
    r"""
    Load questions, with or without answers, in any format of [`load_rows`].

    Returns:
        The questions (see [`split_questions`]; `images` are names, `id` is kept), and a function that opens the image
        of a name.

    Raises:
        `ValueError`: if there are no rows, and see [`load_rows`].
        `FileNotFoundError`: naming the row of an image file that does not exist.
    """
    rows = load_rows(dataset, image_folder=image_folder, require_answers=False, keep_columns=["id"])
    rows = undecoded_images(rows)
    folder = os.path.abspath(image_folder or (dataset if os.path.isdir(dataset) else os.path.dirname(dataset)))
    places: dict[str, tuple[int, int]] = {}

    def image_name(image: dict, index: int, position: int) -> str:
        name = f"row {index}, image {position}"
        if image["bytes"] is None:
            if not os.path.isfile(image["path"]):
                raise FileNotFoundError(f"{dataset}, row {index}: the image file {image['path']} does not exist.")
            name = os.path.relpath(image["path"], folder)
        places.setdefault(name, (index, position))
        return name

    questions = []
    for index, row in enumerate(rows):
        names = [image_name(image, index, position) for position, image in enumerate(row["images"])]
        row_id = json.loads(row["id"])
        for question in split_questions([{**row, "images": names}], unanswered=True):
            # the answer is not compared here: `vtlmm eval` scores answers
            kept = {key: value for key, value in question.items() if key not in ("row", "answer")}
            questions.append({**kept, **({} if row_id is None else {"id": row_id})})
    if not questions:
        raise ValueError(f"{dataset} has no rows with a question.")

    def load_image(name: str) -> Image.Image:
        index, position = places[name]
        return open_image(rows[index]["images"][position])

    return questions, load_image


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
