# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Intervals, tests and AUROC, on inputs with known results."""

from math import comb

import numpy as np
import pytest

from vtlmm.evaluation.statistics import (
    DIFFERENCE_BOUNDS,
    SCORE_BOUNDS,
    auroc,
    auroc_estimate,
    bootstrap_interval,
    mcnemar,
    mean_estimate,
    t_estimate,
    t_quantile,
    wilson_interval,
)


def wilson(share: float, number: int, z: float = 1.959963984540054) -> tuple[float, float]:
    center = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * (share * (1 - share) / number + z**2 / (4 * number**2)) ** 0.5
    return center - half, center + half


def test_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        estimate = mean_estimate(rng.random(60) < 0.3)
        covered += estimate.low <= 0.3 <= estimate.high
    assert 180 <= covered <= 198


def test_clusters_widen_the_interval():
    scores = np.repeat(np.random.default_rng(0).random(20) < 0.5, 10).astype(float)
    low, high = bootstrap_interval(scores, np.repeat(np.arange(20), 10))
    single_low, single_high = bootstrap_interval(scores, np.arange(200))
    assert (high - low) / (single_high - single_low) == pytest.approx(10**0.5, rel=0.15)


@pytest.mark.parametrize(("right", "number"), [(0, 40), (19, 19), (0, 1)])
def test_equal_scores_have_the_interval_of_wilson(right, number):
    scores = [float(i < right) for i in range(number)]
    estimate = mean_estimate(scores, bounds=SCORE_BOUNDS)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(right / number, number), abs=1e-9)
    assert (estimate.low, estimate.high) == pytest.approx(wilson_interval(right, number))
    assert estimate.low == estimate.value or estimate.high == estimate.value


def test_equal_clusters_count_once():
    """Twenty questions about two images are two observations, not twenty."""
    images = ["a"] * 10 + ["b"] * 10
    estimate = mean_estimate([1.0] * 20, images, bounds=SCORE_BOUNDS)
    assert (estimate.low, estimate.n) == (pytest.approx(wilson(1, 2)[0]), 20)


def test_equal_models_have_an_interval_around_zero():
    estimate = mean_estimate([0.0] * 40, bounds=DIFFERENCE_BOUNDS)
    assert estimate.high == pytest.approx(wilson(0, 40)[1]) and estimate.low == -estimate.high


def test_mean_of_no_values_is_rejected():
    with pytest.raises(ValueError, match="at least one value"):
        mean_estimate([])


def test_mcnemar_equals_the_binomial_sum():
    first, second = [1, 1, 1, 0, 0, 0.5, 1], [0, 1, 0, 1, 0, 0.3, 0]
    test = mcnemar(first, second)
    assert (test.first_better, test.second_better) == (4, 1)
    assert test.p_value == pytest.approx(2 * (comb(5, 0) + comb(5, 1)) / 2**5)
    assert mcnemar([1, 0], [1, 0]).p_value == 1
    assert 0 < mcnemar([1] * 3000 + [0] * 2000, [0] * 3000 + [1] * 2000).p_value < 1e-40


def test_t_interval_by_hand():
    assert t_quantile(0.95, 1) == pytest.approx(12.7062, abs=1e-4)
    assert t_quantile(0.95, 9) == pytest.approx(2.26216, abs=1e-5)
    estimate = t_estimate([1.0, 3.0])
    assert (estimate.value, estimate.high - 2) == (2, pytest.approx(12.7062, abs=1e-3))
    with pytest.raises(ValueError, match="at least two values"):
        t_estimate([1.0])


def test_auroc_by_hand():
    # 0.9 wins 3 pairs; 0.4 wins one, ties one and loses one
    assert auroc([0.9, 0.4], [0.1, 0.4, 0.5]) == pytest.approx(4.5 / 6)
    assert auroc([2.0, 3.0], [1.0, 1.0, 0.0]) == 1
    assert auroc([1.0] * 2, [1.0] * 3) == 0.5
    with pytest.raises(ValueError, match="positives and negatives"):
        auroc([1.0], [])


def test_auroc_equals_the_count_of_pairs():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 9, 70).astype(float), rng.integers(0, 7, 50).astype(float)
    difference = positive[:, None] - negative[None]
    estimate = auroc_estimate(positive, negative)
    assert estimate.value == pytest.approx(((difference > 0) + 0.5 * (difference == 0)).mean())
    assert estimate.low < estimate.value < estimate.high and estimate.n == 120
