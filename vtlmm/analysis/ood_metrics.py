# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Whether a model knows what it does not know: calibration, and telling strange images from those of its domain."""

import numpy as np
import torch

from vtlmm.evaluation.statistics import LEVEL, NUM_DRAWS

from .metrics import auroc


NUM_BINS = 10


def _drawn(number: int, num_draws: int, seed: int) -> np.ndarray:
    """How often each of `number` images is in each draw with replacement, (num_draws, number)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(number, np.full(number, 1 / number), size=num_draws).astype(float)


def _estimate(value: float, draws: np.ndarray, number: int) -> dict:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(value), "low": float(low), "high": float(high), "n": number}


def calibration_error(probabilities, correct, clusters, num_draws: int = NUM_DRAWS, seed: int = 0) -> dict:
    r"""
    Expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599): over ten bins of equal width, the
    mean of |share of right answers − mean probability|, weighted by how many answers a bin has.

    It cannot be below 0, so that chance alone makes it larger than 0, the more the fewer answers there are, and the
    draws of the bootstrap larger still: compare sets of like size, or read the interval as an upper one.

    Args:
        probabilities (sequence of `float`): of each answer as a whole, as the model gave it.
        correct (sequence of `float`): 1 where it was right, 0 where not.
        clusters (sequence): what each answer belongs to, e.g. its image.

    Returns:
        `dict`: `value`, its 95 % interval by bootstrap over clusters `low`, `high`, and `n` clusters.
    """
    probabilities, correct = np.asarray(probabilities, dtype=float), np.asarray(correct, dtype=float)
    _, members = np.unique(np.asarray(clusters), return_inverse=True)
    bins = np.clip((probabilities * NUM_BINS).astype(int), 0, NUM_BINS - 1)
    gaps, number = np.zeros((members.max() + 1, NUM_BINS)), np.bincount(members)
    np.add.at(gaps, (members, bins), correct - probabilities)
    draws = _drawn(len(number), num_draws, seed)
    found = np.abs(draws @ gaps).sum(1) / (draws @ number)
    return _estimate(np.abs(gaps.sum(0)).sum() / number.sum(), found, len(number))


def detection(inside, outside, num_draws: int = NUM_DRAWS, seed: int = 0) -> dict:
    r"""
    AUROC of a score as a detector of strange images: the probability that one from outside the domain has the
    higher score. 0.5 is chance; below it strange images score lower.

    Args:
        inside, outside (sequence of `float`): one score a image.

    Returns:
        `dict`: `value`, its 95 % interval by bootstrap over the images of both sets `low`, `high`, and `n` images.
    """
    inside, outside = np.asarray(inside, dtype=float), np.asarray(outside, dtype=float)
    is_outside = torch.arange(len(outside) + len(inside)) < len(outside)
    value = auroc(torch.from_numpy(np.concatenate([outside, inside])), is_outside)
    difference = outside[:, None] - inside[None, :]
    higher = (difference > 0) + 0.5 * (difference == 0)
    of_inside, of_outside = (_drawn(len(scores), num_draws, seed + i) for i, scores in enumerate((inside, outside)))
    draws = ((of_outside @ higher) * of_inside).sum(1) / higher.size
    return _estimate(value, draws, len(inside) + len(outside))
