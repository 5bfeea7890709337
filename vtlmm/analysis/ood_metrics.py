# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Calibration of answers, and detection of out-of-distribution (OOD) images."""

from collections.abc import Sequence

import numpy as np

from vtlmm.evaluation.statistics import NUM_DRAWS, Estimate, auroc_estimate, quantile_interval


NUM_BINS = 10


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
    bins = np.clip((probability * NUM_BINS).astype(int), 0, NUM_BINS - 1)
    gaps, number = np.zeros((members.max() + 1, NUM_BINS)), np.bincount(members)
    np.add.at(gaps, (members, bins), score - probability)
    counts = _draw_counts(len(number), num_draws, seed)
    draws = np.abs(counts @ gaps).sum(1) / (counts @ number)
    return Estimate(float(np.abs(gaps.sum(0)).sum() / number.sum()), *quantile_interval(draws), len(number))


def detection_auroc(
    in_distribution: Sequence[float],
    out_of_distribution: Sequence[float],
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> Estimate:
    r"""
    Return the AUROC of a score as a detector of OOD images.

    It is the probability that an OOD image has a higher score than an in-distribution image. Chance is 0.5.

    Args:
        in_distribution, out_of_distribution (sequence of `float`): One score per image.
        num_draws (`int`, *optional*, defaults to 2000), seed (`int`, *optional*, defaults to 0)

    Returns:
        [`Estimate`]: With `n` images of both sets, and the bootstrap interval over the images of both sets.
    """
    return auroc_estimate(out_of_distribution, in_distribution, num_draws, seed)
