# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Make yes/no questions from the labels of images, e.g. for `evaluate.ood_datasets` of a grid.

`python -m vtlmm.ablations.presence_questions LABELED.parquet OUT.parquet --labels objects --ask WBC="white blood
cell" Platelets=platelet` writes rows with `image`, `questions` and `answers`.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value, load_dataset


QUESTION = "is there a {} in the image?"


def presence_questions(source: str, labels: str, words: dict[str, str], question: str = QUESTION) -> Dataset:
    r"""
    Return a row for each image, with a question for each label. The answer is "yes" if the image has the label.

    Args:
        source (`str`): parquet file with a column `image`.
        labels (`str`): its column of labels: a text, a list of texts, or a list of objects with `label`.
        words (`dict[str, str]`): label → its words in the question.
        question (`str`, *optional*): text of the question, with `{}` in the place of the words.

    Raises:
        `ValueError`: for a missing column, or a label that no row has.
    """
    rows = load_dataset("parquet", data_files=source, split="train")
    if not {labels, "image"} <= set(rows.column_names):
        raise ValueError(f"{source} has the columns {rows.column_names}. It needs `image` and {labels!r} (--labels).")
    all_labels: set[str] = set()

    def convert(row: dict[str, Any]) -> dict[str, list[str]]:
        entries = row[labels] if isinstance(row[labels], list) else [row[labels]]
        row_labels = {entry["label"] if isinstance(entry, dict) else entry for entry in entries}
        all_labels.update(row_labels)
        answers = ["yes" if label in row_labels else "no" for label in words]
        return {"questions": [question.format(word) for word in words.values()], "answers": answers}

    features = Features({"image": Image(), "questions": List(Value("string")), "answers": List(Value("string"))})
    rows = rows.cast_column("image", Image(decode=False)).select_columns(["image", labels])
    rows = rows.map(convert, load_from_cache_file=False).select_columns(list(features)).cast(features)
    missing = sorted(set(words) - all_labels)
    if missing:
        raise ValueError(f"No row of {source} has the labels {missing}. Use some of {sorted(all_labels)}.")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="parquet file with images and labels")
    parser.add_argument("output", type=Path, help="parquet file for the questions")
    parser.add_argument("--labels", required=True, metavar="COLUMN", help="column of labels")
    parser.add_argument("--ask", required=True, nargs="+", metavar="LABEL=WORDS", help="labels to ask about")
    parser.add_argument("--question", default=QUESTION, help=f"default: {QUESTION!r}")
    arguments = parser.parse_args()
    words = dict(pair.split("=", 1) for pair in arguments.ask)
    questions = presence_questions(arguments.source, arguments.labels, words, arguments.question)
    questions.to_parquet(arguments.output)
    print(f"Wrote {len(questions)} images with {len(words)} questions each to {arguments.output}")
