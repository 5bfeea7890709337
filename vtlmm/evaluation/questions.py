# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Read the questions of an evaluation dataset."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, Image, List

from vtlmm.data.images import image_key, open_image
from vtlmm.data.questions import split_questions

from .prompts import build_prompt


ImagePositions = dict[str, tuple[int, int]]  # image key to (row, position in its `images`)


def read_questions(
    rows: Dataset,
    kind: str | None = None,
    references: str | None = None,
    row_id: str | None = None,
    row_numbers: Sequence[int] | None = None,
) -> tuple[list[dict[str, Any]], ImagePositions]:
    r"""
    Return one question for each answered turn, and the position of each image. No image is decoded.

    Args:
        rows ([`~datasets.Dataset`]): rows of [`load_rows`]; the columns that the other arguments name are JSON texts
            (`keep_columns`).
        kind (`str`, *optional*): column with the kind of the question, or a list with the kind of each turn.
        references (`str`, *optional*): column with all accepted answers, for rows with one question.
        row_id (`str`, *optional*): column with the id of the question.
        row_numbers (sequence of `int`, *optional*): number of each row in the dataset, if rows were left out.

    Returns:
        `tuple[list[dict], dict]`: questions as in [`split_questions`], with image keys as `images`, the ground truth
        `answer` (a text or the list of references), `kind` and `id`; and key to (row, position) of each image.

    Raises:
        `ValueError`: for rows without an answered question, and a column that does not fit its row.
    """
    questions: list[dict[str, Any]] = []
    image_positions: ImagePositions = {}
    file_keys: dict[str, str] = {}
    named = {name: column for name, column in {"kind": kind, "answer": references, "id": row_id}.items() if column}
    filled = set()
    for index, row in enumerate(rows.cast_column("images", List(Image(decode=False)))):
        number = index if row_numbers is None else row_numbers[index]
        keys = []
        for position, image in enumerate(row["images"]):
            path = image["path"] if image["bytes"] is None else None
            key = file_keys[path] if path in file_keys else image_key(image)
            if path is not None:
                file_keys[path] = key  # many rows may ask about one file
            image_positions.setdefault(key, (index, position))
            keys.append(key)
        turns = split_questions([{**row, "images": keys}])
        columns = {name: json.loads(row[column]) for name, column in named.items()}
        columns = {name: value for name, value in columns.items() if value is not None}
        filled |= set(columns)
        for turn_number, turn in enumerate(turns):
            turn_columns = _columns_of_turn(columns, turn_number, len(turns), number)
            questions.append({**turn, "row": number, "kind": "all", "id": None, **turn_columns})
    if not questions:
        raise ValueError("No row has a question with an answer. Add a user message and an assistant message.")
    if len(filled) < len(named):
        raise ValueError(f"No row has a column {next(named[name] for name in named if name not in filled)!r}.")
    return questions, image_positions


def _columns_of_turn(columns: dict[str, Any], turn: int, num_turns: int, row: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if "kind" in columns:
        kinds = columns["kind"] if isinstance(columns["kind"], list) else [columns["kind"]] * num_turns
        if len(kinds) != num_turns:
            raise ValueError(
                f"Row {row} has {len(kinds)} kinds for {num_turns} questions. Give one for each question."
            )
        values["kind"] = str(kinds[turn])
    if "answer" in columns:
        if num_turns != 1 or not isinstance(columns["answer"], list) or not columns["answer"]:
            raise ValueError(f"Row {row}: the references must be a list of answers, for a row with one question.")
        for answer in columns["answer"]:
            if not isinstance(answer, str):
                raise ValueError(f"Row {row}: the reference {answer!r} is not a text. Write it as a string.")
        values["answer"] = columns["answer"]
    if "id" in columns:
        values["id"] = columns["id"]
    return values


def with_prompt(questions: Sequence[dict[str, Any]], prompt: str | None) -> list[dict[str, Any]]:
    """Return the questions with the ending of a benchmark's prompt."""
    return [{**question, "question": build_prompt(prompt, question["question"])} for question in questions]


def image_loader(rows: Dataset, image_positions: ImagePositions) -> Callable[[str], Any]:
    """Return a function of an image key that opens the image in `rows`, in RGB as in training."""

    def load(key: str):
        row, position = image_positions[key]
        return open_image(rows[row]["images"][position])

    return load
