# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Files for the servers that keep the answers of VQAv2, VizWiz and MMBench, in the forms that LLaVA uploads."""

import json
from pathlib import Path

import pandas as pd

from .vqa_accuracy import normalize_textvqa_answer


# Column of the id by which the server knows a question
JSON_SUBMISSIONS = {"vqav2": "question_id", "vizwiz": "image"}
# What MMBench's table has for reading only
MMBENCH_UNUSED = ["hint", "category", "source", "image", "comment", "l2-category"]


def write_submission(path: str | Path, benchmark: str, answers: dict) -> None:
    r"""
    A JSON file with all answers, normalized as the server would.

    Args:
        path (`str` or `Path`)
        benchmark (`str`): `"vqav2"` or `"vizwiz"`.
        answers (`dict`): question id (VQAv2) or file name of the image (VizWiz) to answer.
    """
    name = JSON_SUBMISSIONS[benchmark]
    entries = [{name: key, "answer": normalize_textvqa_answer(answer)} for key, answer in answers.items()]
    Path(path).write_text(json.dumps(entries), encoding="utf-8")


def write_mmbench_submission(path: str | Path, table: str | Path, answers: dict[int, str]) -> None:
    r"""
    MMBench's own table with a column `prediction`; an `.xlsx`, which the server wants, takes the package openpyxl.

    Args:
        path (`str` or `Path`): `.xlsx`, or `.tsv`.
        table (`str` or `Path`): the benchmark's `.tsv`.
        answers (`dict[int, str]`): `index` of the table to answer.

    Raises:
        `ValueError`: when a question has no answer.
    """
    rows = pd.read_table(table)
    missing = [index for index in rows["index"] if index not in answers]
    if missing:
        raise ValueError(f"{len(missing)} questions of {table} have no answer, e.g. index {missing[0]}.")
    rows = rows.drop(columns=MMBENCH_UNUSED, errors="ignore")
    rows["prediction"] = [answers[index] for index in rows["index"]]
    if Path(path).suffix == ".xlsx":
        rows.to_excel(path, index=False)
    else:
        rows.to_csv(path, sep="\t", index=False)
