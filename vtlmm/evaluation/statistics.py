# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Confidence intervals and tests for scores: bootstrap over images, Wilson, Student's t, McNemar and AUROC."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats


NUM_DRAWS = 2000
LEVEL = 0.95  # confidence level of every interval
VALUES_PER_CHUNK = 100_000  # drawn at the same time; all draws of a large benchmark would need gigabytes

Bounds = tuple[float, float]
SCORE_BOUNDS: Bounds = (0.0, 1.0)
DIFFERENCE_BOUNDS: Bounds = (-1.0, 1.0)


@dataclass
class Estimate:
    """A value with its 95 % interval. `n` is the number of observations, e.g. questions or images."""

    value: float
    low: float
    high: float
    n: int


class McNemarTest(NamedTuple):
    """Numbers of questions where only one of two models is better, and the two-sided p-value of equal numbers."""

    first_better: int
    second_better: int
    p_value: float


def mean_estimate(
    values: Iterable[float], clusters: Sequence[Hashable] | None = None, *, bounds: Bounds | None = None
) -> Estimate:
    r"""
    Return the mean with its bootstrap interval over clusters.

    Args:
        values (iterable of `float`): One value for each question or image.
        clusters (sequence, *optional*): What each value belongs to, e.g. the image of a question. By default
            each value is its own cluster.
        bounds (`tuple[float, float]`, *optional*): Possible values, `SCORE_BOUNDS` or `DIFFERENCE_BOUNDS`. Without
            it, the interval of equal values has no width. See [`bootstrap_interval`].

    Raises:
        `ValueError`: If `values` is empty.
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("The mean of no values is not defined. Give at least one value.")
    low, high = bootstrap_interval(numbers, range(len(numbers)) if clusters is None else clusters, bounds=bounds)
    return Estimate(sum(numbers) / len(numbers), low, high, len(numbers))


def bootstrap_interval(
    scores: Sequence[float],
    clusters: Sequence[Hashable],
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
    *,
    bounds: Bounds | None = None,
) -> tuple[float, float]:
    r"""
    Return the 95 % percentile interval of the mean of `scores`. Whole clusters are drawn with replacement.

    Questions about one image are not independent. Drawing single questions would make the interval too narrow.

    The bootstrap interval of clusters with equal means has no width, e.g. for 0 of 40 correct answers. With `bounds`,
    the interval then assumes that at most a share u of all clusters has another mean, where u is the upper end of
    Wilson's interval of 0 of n. For a proportion this is Wilson's interval.

    Args:
        scores (sequence of `float`): Scores, or differences of two models' scores for a paired interval.
        clusters (sequence): Cluster of each score, e.g. its image.
        num_draws (`int`, *optional*, defaults to 2000), seed (`int`, *optional*, defaults to 0)
        bounds (`tuple[float, float]`, *optional*): Smallest and largest possible score.
    """
    _, members = np.unique(np.asarray(clusters), return_inverse=True)
    sums, counts = np.bincount(members, weights=np.asarray(scores, dtype=float)), np.bincount(members)
    means = np.empty(num_draws)
    generator = np.random.default_rng(seed)
    chunk = max(1, VALUES_PER_CHUNK // len(sums))
    for i in range(0, num_draws, chunk):
        drawn = generator.integers(len(sums), size=(min(chunk, num_draws - i), len(sums)))
        means[i : i + chunk] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = quantile_interval(means)
    if bounds is not None and np.ptp(sums / counts) < 1e-12:
        (_, share), value = wilson_interval(0, len(sums)), float(sums.sum() / counts.sum())
        return value - share * (value - bounds[0]), value + share * (bounds[1] - value)
    return low, high


def quantile_interval(draws: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of bootstrap draws."""
    low, high = np.quantile(np.asarray(draws), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def wilson_interval(successes: int, number: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion (Wilson 1927)."""
    interval = stats.binomtest(successes, number).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def t_quantile(level: float, degrees: int) -> float:
    """Return the t with P(|T| <= t) = `level` for Student's t distribution with `degrees` degrees of freedom."""
    return float(stats.t.ppf((1 + level) / 2, degrees))


def t_estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of at least two independent values, e.g. of seeds, with its 95 % t interval."""
    numbers = np.asarray(values, dtype=float)
    if len(numbers) < 2:
        raise ValueError(f"A t interval needs at least two values, not {len(numbers)}.")
    value = float(numbers.mean())
    half = t_quantile(LEVEL, len(numbers) - 1) * float(stats.sem(numbers))
    return Estimate(value, value - half, value + half, len(numbers))


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemarTest:
    r"""
    Return McNemar's exact test of two models' scores on the same questions (McNemar 1947).

    The test assumes independent questions. Several questions about one image make its p-value too small.
    """
    first_better = sum(a > b for a, b in zip(first, second, strict=True))
    second_better = sum(b > a for a, b in zip(first, second, strict=True))
    number = first_better + second_better
    p_value = float(stats.binomtest(first_better, number).pvalue) if number else 1.0
    return McNemarTest(first_better, second_better, p_value)


# ---- AUROC ----


def auroc(positive: Sequence[float] | np.ndarray, negative: Sequence[float] | np.ndarray) -> float:
    """Return the probability that a positive has a higher score than a negative. Ties count half; chance is 0.5."""
    return float(_auroc(np.asarray(positive, dtype=float)[None], np.asarray(negative, dtype=float)[None])[0])


def _auroc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Return the AUROC of each row, from positives (draws, P) and negatives (draws, N), by the sum of ranks."""
    number, other = positive.shape[1], negative.shape[1]
    if not number or not other:
        raise ValueError(f"AUROC needs positives and negatives, but there are {number} and {other}.")
    ranks = stats.rankdata(np.concatenate([positive, negative], axis=1), axis=1)
    return (ranks[:, :number].sum(1) - number * (number + 1) / 2) / (number * other)


def auroc_estimate(
    positive: Sequence[float], negative: Sequence[float], num_draws: int = NUM_DRAWS, seed: int = 0
) -> Estimate:
    """Return [`auroc`] with its bootstrap interval over positives and negatives. `n` is the number of both."""
    positives, negatives = np.asarray(positive, dtype=float), np.asarray(negative, dtype=float)
    generator = np.random.default_rng(seed)
    total, draws = len(positives) + len(negatives), np.empty(num_draws)
    value = auroc(positives, negatives)
    chunk = max(1, VALUES_PER_CHUNK // total)
    for i in range(0, num_draws, chunk):
        rows = min(chunk, num_draws - i)
        drawn = [
            scores[generator.integers(len(scores), size=(rows, len(scores)))] for scores in (positives, negatives)
        ]
        draws[i : i + rows] = _auroc(*drawn)
    return Estimate(value, *quantile_interval(draws), total)
