# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Files for the servers with the ground truths of VQAv2, VizWiz and MMBench, in the formats that LLaVA uploads."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from vtlmm.data.output_files import atomic_path, write_json

from .scorers import question_options
from .vqa_accuracy import normalize_textvqa_answer


# Benchmark to the column with the id of a question
SUBMISSION_IDS = {"vqav2": "question_id", "vizwiz": "image", "mmbench": "index"}


def check_submission(benchmark: str, questions: Sequence[Mapping[str, Any]], subset: str | None) -> None:
    """
    Check that a submission has every question once, with its id.

    Raises:
        `ValueError`: for a subset, a question without an id, and two questions with one id.
    """
    if subset:
        raise ValueError(f"A submission needs the whole dataset, not {subset}. Remove the limit.")
    seen: dict[Any, int] = {}
    for number, question in enumerate(questions):
        name = question["id"]
        if name is None:
            raise ValueError(
                f"Question {number} ({question['question'][:60]!r}) has no id. A submission to {benchmark} needs the "
                f"column {SUBMISSION_IDS[benchmark]}."
            )
        if name in seen:
            raise ValueError(f"Questions {seen[name]} and {number} have the same id {name}. Remove one of them.")
        seen[name] = number


def write_submission(
    folder: str | Path, benchmark: str, questions: Sequence[Mapping[str, Any]], answers: Sequence[str]
) -> Path:
    r"""
    Write the file that the server of a benchmark accepts, and return its path.

    - VQAv2 and VizWiz: `submission.json` with the answers as the server normalizes them.
    - MMBench: a table of ids, questions, options and predictions: `submission.xlsx`, which the server accepts, or
      `submission.tsv` if openpyxl is not installed.

    Args:
        folder (`str` or `Path`)
        benchmark (`str`): a key of `SUBMISSION_IDS`.
        questions (`list[dict]`): with `id` and `question`; MMBench's questions end with their options.
        answers (`list[str]`): one answer for each question.
    """
    folder = Path(folder)
    pairs = list(zip(questions, answers, strict=True))
    if benchmark != "mmbench":
        name = SUBMISSION_IDS[benchmark]
        entries = [{name: question["id"], "answer": normalize_textvqa_answer(answer)} for question, answer in pairs]
        write_json(folder / "submission.json", entries)
        return folder / "submission.json"
    rows = []
    for question, answer in pairs:
        options = question_options(question["question"])
        text = question["question"].rpartition("\nA. ")[0] if options else question["question"]
        rows.append({"index": question["id"], "question": text, **options, "prediction": answer})
    table = pd.DataFrame(rows)
    table = table[[*(name for name in table if name != "prediction"), "prediction"]]
    path = folder / ("submission.xlsx" if find_spec("openpyxl") else "submission.tsv")
    with atomic_path(path) as draft:
        if path.suffix == ".xlsx":
            table.to_excel(draft, index=False, engine="openpyxl")
        else:
            table.to_csv(draft, sep="\t", index=False)
    return path
