# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Differences of two arms: paired by seed, over images, in words and in a table."""

import pytest

from vtlmm.ablations.paired_tests import compare_arms, format_table, image_interval, paired_difference


def test_paired_interval_by_hand():
    """Differences 1, 2, 3, 4, 5: mean 3, sd √2.5, so half of the interval is 2.7764 · √2.5 / √5 = 1.9632."""
    reference = {seed: 10.0 * seed for seed in range(6)}
    arm = {seed: 10.0 * seed + 1 + seed for seed in range(5)} | {7: 0.0}  # only one of the two has the seeds 5 and 7
    difference = paired_difference(reference, arm)
    assert difference.n == 5 and difference.value == pytest.approx(3)
    assert (difference.low, difference.high) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-4)
    assert difference.reading == "higher" and paired_difference(arm, reference).reading == "lower"


def test_readings_of_a_difference():
    assert paired_difference({0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.5, 1: 0.4, 2: 1.2}).reading == "none shown"
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).reading == "equal with every seed"
    one_seed = paired_difference({0: 1.0}, {0: 3.0})
    assert one_seed.value == 2 and one_seed.low is None and one_seed.reading == "one seed: not known"
    assert paired_difference({0: 1.0}, {1: 3.0}).reading == "no seed in common"


def test_image_interval_draws_images_and_averages_seeds():
    """Two images. All questions about one image gain with one of two seeds, so the mean of a draw is 0 to 0.5."""
    clusters = ["a"] * 50 + ["b"] * 50
    reference = {seed: [0.0] * 100 for seed in range(2)}
    arm = {0: [1.0] * 50 + [0.0] * 50, 1: [0.0] * 100}
    assert image_interval(reference, arm, clusters) == (0.0, 0.5)
    assert image_interval(reference, {5: [0.0] * 100}, clusters) is None


def test_table_of_a_null_result():
    runs = [
        {"arm": arm, "seed": seed, "metrics": {"accuracy": value}}
        for arm, values in {"off": (0.5, 0.6, 0.7), "on": (0.55, 0.55, 0.71)}.items()
        for seed, value in enumerate(values)
    ]
    comparisons = compare_arms(runs, ["off", "on"], "off", {}, [])
    off, on = format_table(comparisons, "off").splitlines()[2:]
    assert off == "| accuracy | off | 3 | 60.0% (10.0%) | reference |  |  |  |"
    # differences 5, −5 and 1 points: mean 1/3, sd 5.033, t 4.3027
    assert on == "| accuracy | on | 3 | 60.3% (9.2%) | +0.3% | -12.2% – +12.8% | – | none shown |"
