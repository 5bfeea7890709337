# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""How sure a score is: bootstrap over images, and McNemar's test for two models on the same questions."""

import numpy as np


NUM_DRAWS = 2000
LEVEL = 0.95


def bootstrap_interval(scores, clusters, num_draws: int = NUM_DRAWS, seed: int = 0) -> tuple[float, float]:
    r"""
    95 % percentile interval of the mean of `scores`, by drawing whole clusters with replacement.

    Questions about one image are not independent: drawn one by one they would give too narrow an interval. Scores
    that are all equal give one without width, which says nothing of rows that were not asked.

    Args:
        scores (sequence of `float`): or differences of two models' scores, for a paired interval.
        clusters (sequence): what each score belongs to, e.g. its image.
        num_draws (`int`, *optional*, defaults to 2000)
        seed (`int`, *optional*, defaults to 0)
    """
    _, members = np.unique(np.asarray(clusters), return_inverse=True)
    sums, counts = np.bincount(members, weights=np.asarray(scores, dtype=float)), np.bincount(members)
    generator = np.random.default_rng(seed)
    means = np.empty(num_draws)
    together = max(1, 100_000 // len(sums))  # all draws at once are gigabytes for a large benchmark
    for i in range(0, num_draws, together):
        drawn = generator.integers(len(sums), size=(min(together, num_draws - i), len(sums)))
        means[i : i + together] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar(first, second) -> tuple[int, int, float]:
    r"""
    McNemar's exact test of two models' scores on the same questions (McNemar 1947).

    Returns:
        `tuple[int, int, float]`: questions where only the first is better, where only the second is, and the two-sided
        p-value that they are equally many. Images with several questions make it too small.
    """
    first_better = sum(a > b for a, b in zip(first, second, strict=True))
    second_better = sum(b > a for a, b in zip(first, second, strict=True))
    number, fewer = first_better + second_better, min(first_better, second_better)
    # integers, since a double cannot hold 2^n for many flips; `comb` anew for every k would take seconds
    tail = ways = 1
    for k in range(fewer):
        ways = ways * (number - k) // (k + 1)
        tail += ways
    return first_better, second_better, min(1.0, 2 * tail / 2**number)
