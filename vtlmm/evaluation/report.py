# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What a run found: a table by kind of question with its intervals, as JSON and CSV, and a page of samples."""

import base64
import csv
import html
import io
import json
import random
from pathlib import Path

from vtlmm.data.images import open_image

from .scorers import SCORERS, SUMMARIES
from .statistics import bootstrap_interval


RESULTS_FILE, TABLE_FILE, SAMPLES_FILE = "results.json", "results.csv", "samples.html"
NUM_SAMPLES = 32
SAMPLE_PIXELS = 336  # longest side of a image on the page
STYLE = """
body { font: 15px/1.4 sans-serif; margin: 2em; }
td, th { padding: 0.2em 0.8em; text-align: left; border-bottom: 1px solid #ccc; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(20em, 1fr)); gap: 1em; margin-top: 2em; }
.samples > div { border: 1px solid #ccc; border-left: 6px solid #c33; padding: 0.6em; }
.samples > div.right { border-left-color: #393; }
.samples img { min-width: 8em; max-width: 100%; display: block; }
pre { white-space: pre-wrap; font: inherit; }
"""


def score_answers(questions: list[dict], answers: list[str], scorer: str) -> list[float]:
    r"""
    The score of each answer, 0 to 1. Where a question has several references, VQA accuracy takes them all together,
    every other scorer the best.

    Raises:
        `ValueError`: for a scorer that is not in `SCORERS`, or a question without the ten answers of VQA accuracy.
    """
    if scorer not in SCORERS:
        raise ValueError(f"There is no scorer {scorer!r}; there are {', '.join(SCORERS)}.")
    score = SCORERS[scorer]
    scores = []
    for question, found in zip(questions, answers, strict=True):
        truths = question["answer"] if isinstance(question["answer"], list) else [question["answer"]]
        together = scorer in ("vqa", "textvqa")
        scores.append(score(found, truths) if together else max(score(found, truth) for truth in truths))
    return scores


def image_cluster(question: dict) -> str:
    """What questions have in common that are not independent: their images, or where there is none the question."""
    return " ".join(question["images"]) or f"text {question['question']}"


def summarize(questions: list[dict], answers: list[str], scorer: str) -> dict | None:
    """What the benchmark of a scorer reports beyond a mean, with kinds as its splits or tasks; None for most."""
    if scorer not in SUMMARIES:
        return None
    return SUMMARIES[scorer](
        [
            {"category": q["kind"], "question_id": image_cluster(q), "label": q["answer"], "answer": text}
            for q, text in zip(questions, answers, strict=True)
        ]
    )


def by_kind(questions: list[dict]) -> dict[str, list[int]]:
    """Kind → indices of its questions; at the end `"all"` → all."""
    kinds = sorted({question["kind"] for question in questions} - {"all"})
    groups = {kind: [i for i, question in enumerate(questions) if question["kind"] == kind] for kind in kinds}
    return {**groups, "all": list(range(len(questions)))}


def table_by_kind(questions: list[dict], scores: list[float], blind_scores: list[float] | None) -> list[dict]:
    r"""
    One line per kind, and `"all"` at the end.

    Returns:
        `list[dict]`: `kind`, `n` (questions), `images`, `score` with its 95 % interval `low`, `high`, and the same
        of the blind control, `blind`, `blind_low`, `blind_high`; None where there is no control.
    """
    clusters = [image_cluster(question) for question in questions]
    lines = []
    for kind, chosen in by_kind(questions).items():
        own = [clusters[i] for i in chosen]
        line = {"kind": kind, "n": len(chosen), "images": len({k for i in chosen for k in questions[i]["images"]})}
        for prefix, values in (("", scores), ("blind", blind_scores)):
            mean = low = high = None
            if values is not None:
                values = [values[i] for i in chosen]
                mean, (low, high) = sum(values) / len(values), bootstrap_interval(values, own)
            line |= {prefix or "score": mean, f"{prefix}_low".strip("_"): low, f"{prefix}_high".strip("_"): high}
        lines.append(line)
    return lines


def format_table(lines: list[dict]) -> str:
    """The table in Markdown."""
    text = ["| kind | n | score | 95 % | shuffled images | 95 % |", "|---|---|---|---|---|---|"]
    for line in lines:
        cells = [line["kind"], str(line["n"])]
        for name, low, high in (("score", "low", "high"), ("blind", "blind_low", "blind_high")):
            known = line[name] is not None
            cells += [f"{line[name]:.1%}", f"{line[low]:.1%} – {line[high]:.1%}"] if known else ["–", "–"]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def write_report(
    folder: str | Path,
    questions: list[dict],
    answers: list[str],
    blind_answers: list[str] | None,
    scorer: str,
    load_image,
    about: dict,
) -> dict:
    r"""
    Scores a finished run and writes `results.json`, `results.csv` and `samples.html` into its folder.

    Args:
        questions (`list[dict]`): as they were asked; `images` are keys.
        load_image (callable): key to image from PIL.
        about (`dict`): what else the JSON shall say; `subset`, if there is one, stands above every table.

    Returns:
        `dict`: what `results.json` holds.
    """
    folder = Path(folder)
    scores = score_answers(questions, answers, scorer)
    blind_scores = None if blind_answers is None else score_answers(questions, blind_answers, scorer)
    lines = table_by_kind(questions, scores, blind_scores)
    results = {**about, "scorer": scorer, "empty_answers": sum(not text for text in answers), "kinds": lines}
    results["summary"] = summarize(questions, answers, scorer)
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with open(folder / TABLE_FILE, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*lines[0], "subset"])
        writer.writeheader()
        writer.writerows({**line, "subset": about.get("subset")} for line in lines)
    page = samples_page(questions, answers, blind_answers, scores, results, load_image)
    (folder / SAMPLES_FILE).write_text(page, encoding="utf-8")
    return results


# ---- The page of samples: one file that needs no other ----


def samples_page(questions, answers, blind_answers, scores, results: dict, load_image) -> str:
    """HTML with the table and questions chosen at random, each with its images, answers and truth."""
    head = ["kind", "n", "score", "low", "high", "blind", "blind_low", "blind_high"]
    table = [head, *[[_cell(line[name]) for name in head] for line in results["kinds"]]]
    cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table)
    chosen = sorted(random.Random(0).sample(range(len(questions)), min(NUM_SAMPLES, len(questions))))
    samples = []
    for i in chosen:
        question = questions[i]
        truth = question["answer"] if isinstance(question["answer"], str) else ", ".join(question["answer"])
        parts = {"question": question["question"], "answer": answers[i], "truth": truth}
        if blind_answers is not None:
            parts["with another image"] = blind_answers[i]
        images = "".join(f'<img alt="" src="{data_uri(load_image(key))}">' for key in question["images"])
        text = "".join(f"<pre><b>{name}</b> {html.escape(part)}</pre>" for name, part in parts.items())
        title = html.escape(f"{i} · {question['kind']} · {scores[i]:.2f}")
        samples.append(f'<div class="{"right" if scores[i] >= 0.5 else "wrong"}">{title}{images}{text}</div>')
    title = " · ".join(filter(None, (results.get(name) for name in ("model", "data", "scorer", "subset"))))
    title = html.escape(title)
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
        f'<body><h1>{title}</h1><table>{cells}</table><div class="samples">{"".join(samples)}</div></body></html>\n'
    )


def _cell(value) -> str:
    return "–" if value is None else f"{value:.1%}" if isinstance(value, float) else str(value)


def data_uri(image) -> str:
    """A image from PIL inside a page."""
    image = open_image(image)
    image.thumbnail((SAMPLE_PIXELS, SAMPLE_PIXELS))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
