# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Yes/no questions from the labels of images:

`python -m vtlmm.ablations.presence_questions LABELLED.parquet OUT.parquet --labels objects --ask WBC="white blood
cell" Platelets=platelet` writes rows with `image`, `questions` and `answers`, which everything here reads.
"""

import argparse
from pathlib import Path

from datasets import Features, Image, List, Value, load_dataset


QUESTION = "is there a {} in the image?"


def presence_questions(source: str, labels: str, words: dict[str, str], question: str = QUESTION):
    r"""
    A row for each image, and in it a question for each label: "yes" where the image has it, "no" where not.

    Args:
        source (`str`): parquet file with `image`.
        labels (`str`): its column of labels: a text, a list of texts, or a list of objects with `label`.
        words (`dict[str, str]`): label → how the question calls it.
        question (`str`, *optional*): with `{}` where that goes.

    Raises:
        `ValueError`: for a column or label that no row has.
    """
    rows = load_dataset("parquet", data_files=source, split="train")
    if labels not in rows.column_names or "image" not in rows.column_names:
        raise ValueError(
            f"{source} has the columns {', '.join(rows.column_names)}: --labels and `image` must be there."
        )
    seen = set()

    def convert(row: dict) -> dict:
        given = row[labels] if isinstance(row[labels], list) else [row[labels]]
        own = {entry["label"] if isinstance(entry, dict) else entry for entry in given}
        seen.update(own)
        answers = ["yes" if label in own else "no" for label in words]
        return {"questions": [question.format(word) for word in words.values()], "answers": answers}

    features = Features({"image": Image(), "questions": List(Value("string")), "answers": List(Value("string"))})
    rows = rows.cast_column("image", Image(decode=False)).select_columns(["image", labels])
    rows = rows.map(convert, load_from_cache_file=False).select_columns(list(features)).cast(features)
    if set(words) - seen:
        raise ValueError(f"No row of {source} has the labels {sorted(set(words) - seen)}; there are {sorted(seen)}.")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="parquet file with image and labels")
    parser.add_argument("output", type=Path, help="parquet file of the questions")
    parser.add_argument("--labels", required=True, metavar="COLUMN")
    parser.add_argument("--ask", required=True, nargs="+", metavar="LABEL=WORDS")
    parser.add_argument("--question", default=QUESTION, help=f"default: {QUESTION!r}")
    arguments = parser.parse_args()
    asked = dict(pair.split("=", 1) for pair in arguments.ask)
    found = presence_questions(arguments.source, arguments.labels, asked, arguments.question)
    print(f"{len(found)} images, {len(asked)} questions each: {arguments.output}")
    found.to_parquet(arguments.output)
