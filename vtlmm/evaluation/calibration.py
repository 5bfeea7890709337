# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Calibration: how well the probability of an answer predicts whether it is right."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .statistics import NUM_DRAWS, SCORE_BOUNDS, Estimate, mean_estimate, quantile_interval


NUM_BINS = 10


def _bins(probabilities: np.ndarray) -> np.ndarray:
    return np.clip((probabilities * NUM_BINS).astype(int), 0, NUM_BINS - 1)


def _draw_counts(number: int, num_draws: int, seed: int) -> np.ndarray:
    """Return how often each of `number` images occurs in each bootstrap draw, (num_draws, number)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(number, np.full(number, 1 / number), size=num_draws).astype(float)


def calibration_error(
    probabilities: Sequence[float],
    correct: Sequence[float],
    clusters: Sequence,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> Estimate:
    r"""
    Return the expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    The mean of |accuracy − mean probability| over ten bins of equal width, weighted by the number of answers per bin.
    The estimate is biased upward for small samples, and the bootstrap draws even more: compare sets of equal size.

    Args:
        probabilities (sequence of `float`): Probability of each whole answer.
        correct (sequence of `float`): 1 for a correct answer, 0 for a wrong one.
        clusters (sequence): Bootstrap cluster of each answer, e.g. its image.
        num_draws (`int`, *optional*, defaults to 2000), seed (`int`, *optional*, defaults to 0)

    Returns:
        [`Estimate`]: With `n` clusters.
    """
    probability, score = np.asarray(probabilities, dtype=float), np.asarray(correct, dtype=float)
    _, members = np.unique(np.asarray(clusters), return_inverse=True)
    bins = _bins(probability)
    gaps, number = np.zeros((members.max() + 1, NUM_BINS)), np.bincount(members)
    np.add.at(gaps, (members, bins), score - probability)
    counts = _draw_counts(len(number), num_draws, seed)
    draws = np.abs(counts @ gaps).sum(1) / (counts @ number)
    return Estimate(float(np.abs(gaps.sum(0)).sum() / number.sum()), *quantile_interval(draws), len(number))


def calibration(probabilities: Sequence[float], scores: Sequence[float], clusters: Sequence) -> dict[str, Any]:
    r"""
    Return the values of a reliability diagram.

    Args:
        probabilities, scores, clusters: see [`calibration_error`]; scores may be fractions.

    Returns:
        `dict`: the expected calibration `error` with its 95 % interval `low` and `high`, and a list `bins`. Each bin
        with answers has their number `n`, their mean `probability`, and their mean `score` with `low` and `high`.
    """
    error, members = calibration_error(probabilities, scores, clusters), _bins(np.asarray(probabilities, dtype=float))
    bins = []
    for number in np.unique(members):
        chosen = np.flatnonzero(members == number).tolist()
        estimate = mean_estimate([scores[i] for i in chosen], [clusters[i] for i in chosen], bounds=SCORE_BOUNDS)
        mean = sum(probabilities[i] for i in chosen) / len(chosen)
        bins.append(
            {"n": estimate.n, "probability": mean, "score": estimate.value, "low": estimate.low, "high": estimate.high}
        )
    return {"error": error.value, "low": error.low, "high": error.high, "bins": bins}
