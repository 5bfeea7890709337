# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The answers of an evaluation with their images as a dataset, for the Hub."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from vtlmm.data.dataset_files import write_dataset
from vtlmm.data.rows import undecoded_images

from .questions import ImagePositions
from .scorers import references, score_answers


FEATURES = Features(
    {
        "images": List(Image()),
        "question": Value("string"),
        "ground_truth": List(Value("string")),
        "answer": Value("string"),
        "answer_with_shuffled_image": Value("string"),
        "score": Value("float64"),
        "probability": Value("float64"),
        "kind": Value("string"),
        "id": Value("string"),
        "row": Value("int64"),
    }
)
CARD = """---
configs:
- config_name: default
  data_files:
  - split: {split}
    path: "{pattern}"
---

The answers of a model to {num_rows:,} questions about images, written by `vtlmm eval`.

```python
from datasets import load_dataset

rows = load_dataset("{name}", split="{split}")
```
"""


def answers_dataset(
    rows: Dataset,
    image_positions: ImagePositions,
    questions: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    shuffled_records: Sequence[Mapping[str, Any]] | None,
    scorer: str,
) -> Dataset:
    r"""
    Return a row for each question, with the columns `FEATURES`. No image is decoded.

    The column `question` has no system message and no context messages; `row` is the row of the evaluated dataset.

    Args:
        rows, questions, image_positions: see [`read_questions`].
        records, shuffled_records: results of [`run_questions`].
        scorer (`str`): a name in [`SCORERS`].
    """
    rows = undecoded_images(rows)
    scores = score_answers(questions, [record["answer"] for record in records], scorer)
    shuffled = [None] * len(records) if shuffled_records is None else [record["answer"] for record in shuffled_records]

    def generate() -> Iterator[dict[str, Any]]:
        for question, record, other, score in zip(questions, records, shuffled, scores, strict=True):
            places = (image_positions[key] for key in question["images"])
            yield {
                "images": [rows[row]["images"][position] for row, position in places],
                "question": question["question"],
                "ground_truth": references(question),
                "answer": record["answer"],
                "answer_with_shuffled_image": other,
                "score": score,
                "probability": record.get("probability"),
                "kind": question["kind"],
                "id": None if question["id"] is None else str(question["id"]),
                "row": question["row"],
            }

    return Dataset.from_generator(generate, features=FEATURES)


def write_answers(answers: Dataset, folder: str | Path) -> Path:
    """Write the result of [`answers_dataset`] as the folder of a Hub dataset; see [`write_dataset`]."""
    return write_dataset(answers, folder, split="test", card=CARD)
