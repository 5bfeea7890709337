# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Evaluate a model on out-of-distribution (OOD) images and on held-out in-distribution images."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vtlmm.analysis.accumulators import Diversity
from vtlmm.analysis.metrics import word_probabilities
from vtlmm.analysis.ood_metrics import detection_auroc
from vtlmm.analysis.patch_features import heads
from vtlmm.data.markdown import markdown_table
from vtlmm.evaluation.calibration import calibration_error
from vtlmm.evaluation.report import image_cluster
from vtlmm.evaluation.scorers import score_answers
from vtlmm.evaluation.shuffled_images import with_shuffled_images
from vtlmm.evaluation.statistics import SCORE_BOUNDS, Estimate, mean_estimate
from vtlmm.inference.generation import Answer


IN_DISTRIBUTION = "held out"
YES_NO_ACCURACY = "accuracy, yes or no"
MOST_FREQUENT_ANSWER = f"{YES_NO_ACCURACY}, most frequent answer"
OOD_NOTE = (
    "Each cell has the mean over the seeds, their standard deviation, and the 95 % interval over images (the mean of "
    "the seeds' bounds). The calibration error is biased upward, more so with fewer questions. The AUROC compares "
    "the images of a set with the held-out images; chance is 0.5."
)


class OODEvaluator:
    r"""
    Compute the metrics of a model on sets of images. Measure the held-out images first.

    Only questions with the answer yes or no are asked, so that the sets are comparable. A model that was trained on
    one kind of image cannot know most other answers about another kind. A set without such questions, e.g. of
    captions, gets the entropies and the AUROC alone.

    Args:
        model ([`VTLMMForConditionalGeneration`])
        answer (`Callable`): function from questions and the features of their images to a list of [`Answer`].
        batch_size (`int`): images per forward pass.
    """

    def __init__(self, model, answer: Callable[..., list[Answer]], batch_size: int):
        self.model, self.answer, self.batch_size = model, answer, batch_size
        self.in_distribution_entropies: list[float] = []

    def measure_in_distribution(
        self, questions: Sequence[dict], features: dict[str, torch.Tensor]
    ) -> dict[str, Estimate]:
        """
        Return metric → estimate for the held-out images.

        Args:
            questions (`Sequence[dict]`): from [`read_questions`].
            features (`dict[str, torch.Tensor]`): image key → vision features, `(num_patches, vision_feature_size)`.
        """
        diversity = visual_token_diversity(self.model, list(features.values()), self.batch_size)
        self.in_distribution_entropies = _entropies(diversity)
        return self._yes_no_metrics(questions, features) | _entropy_metrics(diversity)

    def measure_ood(self, questions: Sequence[dict], features: dict[str, torch.Tensor]) -> dict[str, Estimate]:
        """Return metric → estimate for OOD images, with the AUROC of the entropy as a detector of these images."""
        diversity = visual_token_diversity(self.model, list(features.values()), self.batch_size)
        auroc = detection_auroc(self.in_distribution_entropies, _entropies(diversity))
        metrics = self._yes_no_metrics(questions, features) | _entropy_metrics(diversity)
        return {**metrics, "AUROC of the entropy": auroc}

    def _yes_no_metrics(self, questions: Sequence[dict], features: dict[str, torch.Tensor]) -> dict[str, Estimate]:
        questions = [question for question in questions if _truth(question) in ("yes", "no")]
        if not questions:
            return {}
        clusters = [image_cluster(question) for question in questions]
        answers = self.answer(questions, features)
        scores = score_answers(questions, [answer.text for answer in answers], "exact")
        probabilities = [math.exp(answer.log_probability) for answer in answers]
        shuffled = self.answer(with_shuffled_images(questions), features)
        shuffled_scores = score_answers(questions, [answer.text for answer in shuffled], "exact")
        is_yes = [_truth(question) == "yes" for question in questions]
        most_frequent = sum(is_yes) * 2 >= len(is_yes)
        return {
            YES_NO_ACCURACY: mean_estimate(scores, clusters, bounds=SCORE_BOUNDS),
            f"{YES_NO_ACCURACY}, shuffled images": mean_estimate(shuffled_scores, clusters, bounds=SCORE_BOUNDS),
            MOST_FREQUENT_ANSWER: mean_estimate([yes == most_frequent for yes in is_yes], clusters),
            "calibration error": calibration_error(probabilities, scores, clusters),
        }


def is_model_metric(metric: str) -> bool:
    """Return False for the share of the most frequent answer, which depends on the questions alone."""
    return metric != MOST_FREQUENT_ANSWER


@torch.inference_mode()
def visual_token_diversity(model, features: Sequence[torch.Tensor], batch_size: int) -> Diversity:
    """Return the statistics of the visual tokens of images with the vision features `features`."""
    vm_weight, _, _ = heads(model)
    diversity = Diversity(len(vm_weight), vm_weight.device)
    for start in range(0, len(features), batch_size):
        batch = torch.stack(list(features[start : start + batch_size])).to(model.device, model.dtype)
        encoded = model.model.get_image_features(vision_features=batch)
        for image in model.model.vm_head.residual_block(encoded.image_features):
            diversity.add(word_probabilities(image, vm_weight))
    return diversity


def _entropies(diversity: Diversity) -> list[float]:
    """Return the mean entropy of the visual tokens of each image."""
    return [row[0] for row in diversity.entropies]


def _entropy_metrics(diversity: Diversity) -> dict[str, Estimate]:
    result = diversity.result()
    return {
        "entropy of visual tokens": result["entropy"],
        "entropy of the mean visual token": result["entropy_of_mean"],
    }


def _truth(question: dict) -> str:
    return str(question["answer"]).strip().lower()


# ---- Over seeds ----


@dataclass
class OODSummary:
    r"""
    One metric of one arm on one set of images, over the seeds.

    Attributes:
        metric, images, arm (`str`): `images` is the name of the set.
        values (`dict[int, float]`): seed → value.
        mean (`float`), sd (`float`, *optional*): over the seeds; `sd` is None for one seed.
        low, high (`float`, *optional*): bounds of the seeds' intervals over images, averaged.
        n (`int`): number of questions or images.
    """

    metric: str
    images: str
    arm: str
    values: dict[int, float]
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    n: int


def summarize_ood(runs: Iterable[dict], arms: Sequence[str]) -> list[OODSummary]:
    r"""
    Return a summary for each metric, set of images and arm that has a run, sorted by metric.

    Args:
        runs (iterable of `dict`): lines of `rows.jsonl` with `arm`, `seed` and `ood`.
        arms (`Sequence[str]`): names of the arms in their order.
    """
    runs = list(runs)
    pairs = dict.fromkeys((metric, images) for run in runs for images in run["ood"] for metric in run["ood"][images])
    metrics = list(dict.fromkeys(metric for metric, _ in pairs))
    summaries = []
    for metric, images in sorted(pairs, key=lambda pair: metrics.index(pair[0])):
        for arm in arms:
            estimates = {run["seed"]: run["ood"][images][metric] for run in runs if run["arm"] == arm}
            if not estimates:
                continue
            values = {seed: estimate["value"] for seed, estimate in estimates.items()}
            numbers = list(values.values())
            summaries.append(
                OODSummary(
                    metric,
                    images,
                    arm,
                    values,
                    mean=float(np.mean(numbers)),
                    sd=float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None,
                    low=float(np.mean([estimate["low"] for estimate in estimates.values()])),
                    high=float(np.mean([estimate["high"] for estimate in estimates.values()])),
                    n=next(iter(estimates.values()))["n"],
                )
            )
    return summaries


def format_ood(summaries: Sequence[OODSummary]) -> str:
    """Return a Markdown table with a line for each metric and arm, and a column for each set of images."""
    sets = list(dict.fromkeys(summary.images for summary in summaries))
    cells = {(summary.metric, summary.arm, summary.images): _cell(summary) for summary in summaries}
    lines = dict.fromkeys((summary.metric, summary.arm) for summary in summaries)
    rows = [[*line, *(cells.get((*line, images), "–") for images in sets)] for line in lines]
    return markdown_table(["metric", "arm", *sets], rows)


def _cell(summary: OODSummary) -> str:
    form = ".1%" if summary.metric.startswith("accuracy") else ".3f"
    spread = "–" if summary.sd is None else f"{summary.sd:{form}}"
    text = f"{summary.mean:{form}} ({spread})"
    if summary.low is None or summary.high is None:
        return text
    return f"{text}; {summary.low:{form}} – {summary.high:{form}}"
