# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Detection of out-of-distribution (OOD) images."""

from collections.abc import Sequence

from vtlmm.evaluation.statistics import NUM_DRAWS, Estimate, auroc_estimate


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
