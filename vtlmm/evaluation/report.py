# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Report an evaluation: a table by kind of question with intervals, as JSON and CSV, and a page of samples."""

import base64
import html
import io
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtlmm.data.images import open_image
from vtlmm.data.markdown import markdown_table
from vtlmm.data.output_files import write_csv, write_json, write_text

from .scorers import references, score_answers, summarize
from .statistics import SCORE_BOUNDS, mean_estimate


RESULTS_FILE, TABLE_FILE, SAMPLES_FILE = "results.json", "results.csv", "samples.html"
# Columns of a score and its interval, with the right images and with shuffled images
SCORE_COLUMNS = ("score", "low", "high")
SHUFFLED_COLUMNS = ("score_shuffled_images", "low_shuffled_images", "high_shuffled_images")
NUM_SAMPLES = 32
SAMPLE_PIXELS = 336  # longest side of an image on the page
STYLE = """
body { font: 15px/1.4 sans-serif; margin: 2em; }
td, th { padding: 0.2em 0.8em; text-align: left; border-bottom: 1px solid #ccc; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(20em, 1fr)); gap: 1em; margin-top: 2em; }
.samples > div { border: 1px solid #ccc; border-left: 6px solid #c33; padding: 0.6em; }
.samples > div.right { border-left-color: #393; }
.samples img { min-width: 8em; max-width: 100%; display: block; }
pre { white-space: pre-wrap; font: inherit; }
"""

Questions = Sequence[Mapping[str, Any]]


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
            found = mean_estimate([values[i] for i in chosen], [clusters[i] for i in chosen], bounds=SCORE_BOUNDS)
            line |= dict(zip(columns, (found.value, found.low, found.high), strict=True))
        lines.append(line)
    return lines


def format_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the lines of [`table_by_kind`] as a Markdown table."""
    rows = []
    for line in lines:
        row = [line["kind"], line["n"]]
        for score, low, high in (SCORE_COLUMNS, SHUFFLED_COLUMNS):
            known = line[score] is not None
            row += [f"{line[score]:.1%}", f"{line[low]:.1%} – {line[high]:.1%}"] if known else ["–", "–"]
        rows.append(row)
    return markdown_table(["kind", "n", "score", "95 %", "shuffled images", "95 %"], rows)


def write_report(
    folder: str | Path,
    questions: Questions,
    prompts: Questions,
    answers: Sequence[str],
    answers_shuffled_images: Sequence[str] | None,
    scorer: str,
    load_image: Callable,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    r"""
    Score a finished run and write `results.json`, `results.csv` and `samples.html` into its folder.

    Args:
        questions (`list[dict]`): questions of [`read_questions`]; `images` are keys.
        prompts (`list[dict]`): the questions with the ending of their prompt, for the page of samples.
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
    header = [*lines[0], "subset"]
    rows = [[*line.values(), about.get("subset")] for line in lines]
    write_csv(folder / TABLE_FILE, header, rows)
    page = samples_page(prompts, answers, answers_shuffled_images, scores, results, load_image)
    write_text(folder / SAMPLES_FILE, page)
    write_json(folder / RESULTS_FILE, results)  # last: this file marks a finished run
    return results


# ---- The page of samples: one file without external resources ----


def samples_page(
    questions: Questions,
    answers: Sequence[str],
    answers_shuffled_images: Sequence[str] | None,
    scores: Sequence[float],
    results: Mapping[str, Any],
    load_image: Callable,
) -> str:
    """Return HTML with the table and random questions, each with its images, answers and ground truth."""
    head = ["kind", "n", *SCORE_COLUMNS, *SHUFFLED_COLUMNS]
    table = [head, *[[_cell(line[name]) for name in head] for line in results["kinds"]]]
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table)
    samples = []
    for i in sorted(random.Random(0).sample(range(len(questions)), min(NUM_SAMPLES, len(questions)))):
        question = questions[i]
        parts = {"question": question["question"], "answer": answers[i], "truth": ", ".join(references(question))}
        if answers_shuffled_images is not None:
            parts["with another image"] = answers_shuffled_images[i]
        images = "".join(f'<img alt="" src="{data_uri(load_image(key))}">' for key in question["images"])
        text = "".join(f"<pre><b>{name}</b> {html.escape(part)}</pre>" for name, part in parts.items())
        title = html.escape(f"{i} · {question['kind']} · {scores[i]:.2f}")
        samples.append(f'<div class="{"right" if scores[i] >= 0.5 else "wrong"}">{title}{images}{text}</div>')
    title = html.escape(
        " · ".join(filter(None, (results.get(name) for name in ("model", "data", "scorer", "subset"))))
    )
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
        f'<body><h1>{title}</h1><table>{cells}</table><div class="samples">{"".join(samples)}</div></body></html>\n'
    )


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.1%}" if isinstance(value, float) else str(value)


def data_uri(image: Any) -> str:
    """Return an image from PIL as a `data:` URI for an HTML page."""
    image = open_image(image)
    image.thumbnail((SAMPLE_PIXELS, SAMPLE_PIXELS))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
