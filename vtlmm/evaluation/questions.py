# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Read the questions of an evaluation dataset."""

import json

from datasets import Image, List

from vtlmm.data.images import image_key, open_image
from vtlmm.data.questions import split_questions

from .prompts import build_prompt


def read_questions(rows, kind: str | None = None, references: str | None = None, row_id: str | None = None):
    r"""
    One question per answered turn, and where each image is. No image is decoded or kept.

    Args:
        rows ([`~datasets.Dataset`]): with `messages` and `images`, and the columns that the other arguments name, as
            JSON texts.
        kind (`str`, *optional*): column with the kind of the question, or a list of them, one a turn.
        references (`str`, *optional*): column with all accepted answers, for rows of one question.
        row_id (`str`, *optional*): column by which others know the question.

    Returns:
        `tuple[list[dict], dict]`: questions with `images` (keys), `question`, `answer` (the truth: a text, or the list
        of references), `kind` and `id`; and key to (row, position) of a image.

    Raises:
        `ValueError`: for rows without an answered question, or a column that does not fit its row.
    """
    questions, places, file_keys = [], {}, {}
    named = {name: column for name, column in {"kind": kind, "answer": references, "id": row_id}.items() if column}
    found = set()
    for index, row in enumerate(rows.cast_column("images", List(Image(decode=False)))):
        keys = []
        for position, image in enumerate(row["images"]):
            path = image["path"] if image["bytes"] is None else None
            key = file_keys.get(path) or image_key(image)
            if path is not None:
                file_keys[path] = key  # many rows may ask about one file
            places.setdefault(key, (index, position))
            keys.append(key)
        turns = split_questions([{**row, "images": keys}])
        columns = {name: json.loads(row[column]) for name, column in named.items()}
        columns = {name: value for name, value in columns.items() if value is not None}
        found |= set(columns)
        for number, turn in enumerate(turns):
            questions.append(
                {
                    **turn,
                    "row": index,
                    "kind": "all",
                    "id": None,
                    **_columns_of_turn(columns, number, len(turns), index),
                }
            )
    if not questions:
        raise ValueError("No row has a question with an answer: a user's turn and the assistant's after it.")
    if len(found) < len(named):
        raise ValueError(f"No row has a column {next(named[name] for name in named if name not in found)!r}.")
    return questions, places


def _columns_of_turn(columns: dict, number: int, num_turns: int, index: int) -> dict:
    found = {}
    if "kind" in columns:
        kinds = columns["kind"] if isinstance(columns["kind"], list) else [columns["kind"]] * num_turns
        if len(kinds) != num_turns:
            raise ValueError(f"Row {index} has {len(kinds)} kinds for {num_turns} questions.")
        found["kind"] = str(kinds[number])
    if "answer" in columns:
        if num_turns != 1 or not isinstance(columns["answer"], list):
            raise ValueError(f"Row {index}: references must be a list of answers, and the row one question.")
        found["answer"] = [str(answer) for answer in columns["answer"]]
    if "id" in columns:
        found["id"] = columns["id"]
    return found


def with_prompt(questions: list[dict], prompt: str | None) -> list[dict]:
    if prompt is None:
        return questions
    return [{**question, "question": build_prompt(prompt, question["question"])} for question in questions]


def image_loader(rows, places: dict):
    """Function of a image's key that reads it from `rows`; in RGB, as the training does."""

    def load(key: str):
        row, position = places[key]
        return open_image(rows[row]["images"][position])

    return load
