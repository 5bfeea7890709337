# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""An HTML page with the scores of an evaluation and random samples, in one file without external resources."""

import base64
import io
import random
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from jinja2 import Environment

from vtlmm.data.images import open_image
from vtlmm.hub.repository import is_hub_id

from .scorers import references


# Columns of a score and its interval, with the right images and with shuffled images
SCORE_COLUMNS = ("score", "low", "high")
SHUFFLED_COLUMNS = ("score_shuffled_images", "low_shuffled_images", "high_shuffled_images")
SCORE_NAMES = ["accuracy", "95 % interval", "accuracy with shuffled images", "95 % interval"]
NUM_SAMPLES = 32
SAMPLE_PIXELS = 640  # longest side of an image on the page
RIGHT = 0.5  # score from which an answer is right

Questions = Sequence[Mapping[str, Any]]


def samples_page(
    questions: Questions,
    answers: Sequence[str],
    answers_shuffled_images: Sequence[str] | None,
    scores: Sequence[float],
    results: Mapping[str, Any],
    load_image: Callable,
) -> str:
    r"""
    Return HTML with the table and random questions, each with its images, answers and ground truth.

    Args:
        questions (`list[dict]`): Questions of [`read_questions`] with the ending of their prompt.
        scores (`list[float]`): Score of each answer, 0 to 1.
        results (`dict`): Content of `results.json`.
        load_image (`Callable`): Image key to image.
    """
    chosen = sorted(random.Random(0).sample(range(len(questions)), min(NUM_SAMPLES, len(questions))))
    samples = []
    for i in chosen:
        question = questions[i]
        texts = {"Question": question["question"], "Answer": answers[i]}
        texts["Ground truth"] = ", ".join(references(question))
        if answers_shuffled_images is not None:
            texts["Answer with a shuffled image"] = answers_shuffled_images[i]
        samples.append(
            {
                "number": i,
                "row": question["row"],
                "link": _row_link(results, question["row"]) or f"#question-{i}",
                "kind": question["kind"],
                "score": scores[i],
                "is_right": scores[i] >= RIGHT,
                "images": [data_uri(load_image(key), SAMPLE_PIXELS) for key in question["images"]],
                "texts": texts,
            }
        )
    template = Environment(autoescape=True).from_string(
        files("vtlmm.evaluation").joinpath("templates/samples.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        title=f"Evaluation of {results.get('model') or 'a model'}",
        about=_about(results),
        table=[score_cells(line) for line in results["kinds"]],
        num_questions=len(questions),
        calibration=results.get("calibration"),
        kinds=sorted({sample["kind"] for sample in samples}),
        samples=samples,
    )


def score_cells(line: Mapping[str, Any]) -> list[str]:
    """Return the cells of `SCORE_NAMES` of one line of the table; dashes for a score that was not measured."""
    cells = []
    for score, low, high in (SCORE_COLUMNS, SHUFFLED_COLUMNS):
        known = line[score] is not None
        cells += [f"{line[score]:.1%}", f"{line[low]:.1%} – {line[high]:.1%}"] if known else ["–", "–"]
    return [str(line["kind"]), str(line["n"]), *cells]


def _about(results: Mapping[str, Any]) -> str:
    split = f"split {results['split']}" if results.get("split") and is_hub_id(results.get("data")) else None
    scorer = f"scorer: {results['scorer']}" if results.get("scorer") else None
    return " · ".join(filter(None, (results.get("data"), split, scorer, results.get("subset"))))


def _row_link(results: Mapping[str, Any], row: int) -> str | None:
    """Return the address of a row in the Hub's dataset viewer, or None for rows that are not on the Hub."""
    name, split = results.get("data"), results.get("split")
    if not is_hub_id(name) or not split or "[" in split:
        return None
    return f"https://huggingface.co/datasets/{name}/viewer/default/{quote(split)}?row={row}"


def data_uri(image: Any, pixels: int) -> str:
    """Return an image, made smaller to `pixels` per side at most, as a `data:` URI for an HTML page."""
    image = open_image(image)
    image.thumbnail((pixels, pixels))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
