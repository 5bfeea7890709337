# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""How the paper says that visual tokens fail, each as one number: poor answers, hallucination, instability between
stages, and a large gap between image features and pseudo image features."""

from vtlmm.evaluation.report import image_cluster, score_answers
from vtlmm.evaluation.scorers import pope_answer
from vtlmm.evaluation.statistics import bootstrap_interval
from vtlmm.inference.generation import answer


def _estimate(scores: list[float], asked: list[dict]) -> dict | None:
    """Mean over questions, with the interval by bootstrap over images; None without a question."""
    if not scores:
        return None
    low, high = bootstrap_interval(scores, [image_cluster(question) for question in asked])
    return {"value": sum(scores) / len(scores), "low": low, "high": high, "n": len(scores)}


def evenly(questions: list[dict], number: int) -> list[dict]:
    """At most `number` of the questions about a image, evenly spaced."""
    questions = [question for question in questions if question["images"]]
    number = min(number, len(questions))
    return [questions[i * len(questions) // number] for i in range(number)]


def failure_signatures(
    model, processor, questions: list[dict], load_image, before=None, batch_size: int = 8, max_new_tokens: int = 32
) -> dict:
    r"""
    The failure signatures of a model on questions with known answers, by exact match.

    Args:
        questions (`list[dict]`): `images` are keys; see `run.read_questions`.
        load_image (callable): key to image from PIL.
        before (`tuple`, *optional*): model and processor of the stage before.

    Returns:
        `dict` of estimates, None where the questions have nothing to tell it by:
        `vqa_score`, with the model's own kind of features; `hallucination_rate`, share of the questions whose answer
        is no that get a yes by POPE's rule; `pseudo_image_feature_gap`, the score with image features less that with
        pseudo image features; `stage_instability`, share of the questions that the stage before had right and this one
        has wrong.
    """
    asked = [{**question, "images": [load_image(key) for key in question["images"]]} for question in questions]

    def right(model, processor, pseudo: bool | None = None) -> tuple[list[str], list[float]]:
        own = model.config.use_pseudo_image_features
        model.config.use_pseudo_image_features = own if pseudo is None else pseudo
        try:
            answers = answer(model, processor, asked, batch_size, max_new_tokens)
        finally:
            model.config.use_pseudo_image_features = own
        return answers, score_answers(questions, answers, "exact")

    by_features = {pseudo: right(model, processor, pseudo) for pseudo in (False, True)}
    answers, scores = by_features[model.config.use_pseudo_image_features]
    negative = [i for i, question in enumerate(questions) if question["answer"].strip().lower() == "no"]
    gap = [a - b for a, b in zip(by_features[False][1], by_features[True][1], strict=True)]
    lost = []
    if before is not None:
        _, earlier = right(*before)
        lost = [float(a > b) for a, b in zip(earlier, scores, strict=True)]
    return {
        "vqa_score": _estimate(scores, questions),
        "hallucination_rate": _estimate(
            [float(pope_answer(answers[i]) == "yes") for i in negative],
            [questions[i] for i in negative],
        ),
        "pseudo_image_feature_gap": _estimate(gap, questions),
        "stage_instability": _estimate(lost, questions),
    }
