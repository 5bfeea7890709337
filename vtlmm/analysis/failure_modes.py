# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure the failure modes of visual tokens that the paper names.

They are wrong answers, hallucination, instability between stages, and a gap between image features and pseudo image
features.
"""

from collections.abc import Callable, Sequence

from vtlmm.evaluation.report import image_cluster
from vtlmm.evaluation.scorers import pope_answer, score_answers
from vtlmm.evaluation.statistics import DIFFERENCE_BOUNDS, SCORE_BOUNDS, Bounds, Estimate, mean_estimate
from vtlmm.inference.generation import answer
from vtlmm.inference.loading import LoadedModel


def _estimate(scores: Sequence[float], questions: list[dict], bounds: Bounds = SCORE_BOUNDS) -> Estimate | None:
    """Return the mean over questions with its bootstrap interval over images, or None without questions."""
    if not scores:
        return None
    return mean_estimate(scores, [image_cluster(question) for question in questions], bounds=bounds)


def evenly_spaced(questions: list[dict], number: int) -> list[dict]:
    """Return at most `number` questions with an image, evenly spaced over the list."""
    questions = [question for question in questions if question["images"]]
    number = min(number, len(questions))
    return [questions[i * len(questions) // number] for i in range(number)]


def measure_failure_modes(
    model,
    processor,
    questions: list[dict],
    load_image: Callable,
    previous: LoadedModel | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 32,
) -> dict[str, Estimate | None]:
    r"""
    Answer questions and measure the failure modes by exact match.

    Args:
        model ([`VTLMMForConditionalGeneration`]), processor ([`VTLMMProcessor`])
        questions (`list[dict]`): Questions from [`~vtlmm.evaluation.questions.read_questions`]; `images` are keys.
        load_image (`Callable`): Function of an image key that returns the image from PIL.
        previous ([`~vtlmm.inference.loading.LoadedModel`], *optional*): The previous stage.
        batch_size (`int`, *optional*, defaults to 8), max_new_tokens (`int`, *optional*, defaults to 32)

    Returns:
        `dict[str, Estimate | None]`: None where no question allows the measurement.

        - `vqa_score`: exact match with the model's configured kind of image features.
        - `hallucination_rate`: share of the questions with the answer "no" that are answered "yes" by POPE's rule.
        - `pseudo_image_feature_gap`: score with image features minus score with pseudo image features.
        - `stage_instability`: share of the questions that the previous stage answers correctly and this one does not.
    """
    with_images = [{**question, "images": [load_image(key) for key in question["images"]]} for question in questions]

    def scored_answers(model, processor, pseudo: bool) -> tuple[list[str], list[float]]:
        configured = model.config.use_pseudo_image_features
        model.config.use_pseudo_image_features = pseudo
        try:
            answers = answer(model, processor, with_images, batch_size, max_new_tokens)
        finally:
            model.config.use_pseudo_image_features = configured
        return answers, score_answers(questions, answers, "exact")

    by_features = {pseudo: scored_answers(model, processor, pseudo) for pseudo in (False, True)}
    answers, scores = by_features[model.config.use_pseudo_image_features]
    negative = [i for i, question in enumerate(questions) if question["answer"].strip().lower() == "no"]
    false_yes = [float(pope_answer(answers[i]) == "yes") for i in negative]
    gap = [a - b for a, b in zip(by_features[False][1], by_features[True][1], strict=True)]
    lost: list[float] = []
    if previous is not None:
        pseudo = previous[0].config.use_pseudo_image_features
        _, earlier = scored_answers(previous[0], previous[1], pseudo)
        lost = [float(a > b) for a, b in zip(earlier, scores, strict=True)]
    return {
        "vqa_score": _estimate(scores, questions),
        "hallucination_rate": _estimate(false_yes, [questions[i] for i in negative]),
        "pseudo_image_feature_gap": _estimate(gap, questions, DIFFERENCE_BOUNDS),
        "stage_instability": _estimate(lost, questions),
    }
