# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Report an evaluation: a table by kind of question with intervals, as JSON and CSV, and a page of samples."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtlmm.data.markdown import markdown_table
from vtlmm.data.output_files import write_csv, write_json, write_text

from .calibration import calibration
from .samples_page import SCORE_COLUMNS, SCORE_NAMES, SHUFFLED_COLUMNS, Questions, samples_page, score_cells
from .scorers import score_answers, summarize
from .statistics import SCORE_BOUNDS, mean_estimate


RESULTS_FILE, TABLE_FILE, SAMPLES_FILE = "results.json", "results.csv", "samples.html"


def image_cluster(question: Mapping[str, Any]) -> str:
    """Return the bootstrap cluster of a question: its images, or the question itself without images."""
    return " ".join(question["images"]) or f"text {question['question']}"


def by_kind(questions: Questions) -> dict[str, list[int]]:
    """Return the indices of the questions of each kind, and of all questions as `"all"` at the end."""
    kinds = sorted({question["kind"] for question in questions} - {"all"})
    groups = {kind: [i for i, question in enumerate(questions) if question["kind"] == kind] for kind in kinds}
    return {**groups, "all": list(range(len(questions)))}


def table_by_kind(
    questions: Questions, scores: Sequence[float], scores_shuffled_images: Sequence[float] | None
) -> list[dict[str, Any]]:
    r"""
    Return one line for each kind, and `"all"` at the end.

    Returns:
        `list[dict]`: `kind`, `n` (questions), `images`, the mean `score` with its 95 % interval `low` and `high`, and
        the same with shuffled images (`SHUFFLED_COLUMNS`; None without them).
    """
    clusters = [image_cluster(question) for question in questions]
    lines = []
    for kind, chosen in by_kind(questions).items():
        line: dict[str, Any] = {"kind": kind, "n": len(chosen)}
        line["images"] = len({key for i in chosen for key in questions[i]["images"]})
        for columns, values in ((SCORE_COLUMNS, scores), (SHUFFLED_COLUMNS, scores_shuffled_images)):
            if values is None:
                line |= dict.fromkeys(columns)
                continue
            estimate = mean_estimate([values[i] for i in chosen], [clusters[i] for i in chosen], bounds=SCORE_BOUNDS)
            line |= dict(zip(columns, (estimate.value, estimate.low, estimate.high), strict=True))
        lines.append(line)
    return lines


def format_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the lines of [`table_by_kind`] as a Markdown table."""
    return markdown_table(["kind", "questions", *SCORE_NAMES], [score_cells(line) for line in lines])


def write_report(
    folder: str | Path,
    questions: Questions,
    prompts: Questions,
    answers: Sequence[str],
    answers_shuffled_images: Sequence[str] | None,
    probabilities: Sequence[float | None],
    scorer: str,
    load_image: Callable,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    r"""
    Score a finished run and write `results.json`, `results.csv` and `samples.html` into its folder.

    Args:
        questions (`list[dict]`): questions of [`read_questions`]; `images` are keys.
        prompts (`list[dict]`): the questions with the ending of their prompt, for the page of samples.
        probabilities (`list[float | None]`): probability of each answer, None if an earlier version answered.
        load_image (`Callable`): key to image.
        about (`dict`): further entries of the JSON file. `subset` is shown with every table.

    Returns:
        `dict`: the content of `results.json`.
    """
    folder = Path(folder)
    scores = score_answers(questions, answers, scorer)
    shuffled = None
    if answers_shuffled_images is not None:
        shuffled = score_answers(questions, answers_shuffled_images, scorer)
    lines = table_by_kind(questions, scores, shuffled)
    results = {**about, "scorer": scorer, "empty_answers": sum(not text for text in answers), "kinds": lines}
    results["summary"] = summarize(questions, answers, scorer)
    known = [probability for probability in probabilities if probability is not None]
    is_known = len(known) == len(questions)
    clusters = [image_cluster(question) for question in questions]
    results["calibration"] = calibration(known, scores, clusters) if is_known else None
    header = [*lines[0], "subset"]
    rows = [[*line.values(), about.get("subset")] for line in lines]
    write_csv(folder / TABLE_FILE, header, rows)
    page = samples_page(prompts, answers, answers_shuffled_images, scores, results, load_image)
    write_text(folder / SAMPLES_FILE, page)
    write_json(folder / RESULTS_FILE, results)  # last: this file marks a finished run
    return results
