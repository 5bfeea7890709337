# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Compare each arm of a grid with the reference: differences that are paired by seed, with their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vtlmm.data.markdown import markdown_table
from vtlmm.evaluation.statistics import DIFFERENCE_BOUNDS, bootstrap_interval, t_estimate


Scores = Mapping[int, Sequence[float]]  # seed → score of each question


@dataclass
class PairedDifference:
    r"""
    Mean of arm − reference over the seeds that both have.

    Attributes:
        n (`int`): number of seeds that both have.
        value (`float`, *optional*): None without such a seed.
        low, high (`float`, *optional*): 95 % t interval over the seeds, None for fewer than two.
        reading (`str`): the result in words. An interval that contains 0 reads as "none shown": the arms may
            still differ.
    """

    n: int
    value: float | None
    low: float | None
    high: float | None
    reading: str


@dataclass
class Comparison:
    r"""
    One metric of one arm.

    Attributes:
        metric, arm (`str`)
        values (`dict[int, float]`): seed → value.
        mean (`float`), sd (`float`, *optional*): over the seeds; `sd` is None for one seed.
        difference ([`PairedDifference`], *optional*): to the reference; None for the reference itself.
        image_interval (`tuple[float, float]`, *optional*): 95 % interval of the difference over images, for metrics
            that are means over questions.
    """

    metric: str
    arm: str
    values: dict[int, float]
    mean: float
    sd: float | None
    difference: PairedDifference | None = None
    image_interval: tuple[float, float] | None = None


def paired_difference(reference: Mapping[int, float], arm: Mapping[int, float]) -> PairedDifference:
    r"""
    Return the difference of two arms, paired by seed.

    Args:
        reference, arm (`Mapping[int, float]`): seed → metric.
    """
    seeds = sorted(set(reference) & set(arm))
    values = [arm[seed] - reference[seed] for seed in seeds]
    if len(seeds) < 2:
        reading = "one seed: not known" if seeds else "no seed in common"
        return PairedDifference(len(seeds), values[0] if seeds else None, None, None, reading)
    estimate = t_estimate(values)
    reading = "higher" if estimate.low > 0 else "lower" if estimate.high < 0 else "none shown"
    if not any(values):
        reading = "equal with every seed"
    return PairedDifference(len(seeds), estimate.value, estimate.low, estimate.high, reading)


def image_interval(reference: Scores, arm: Scores, clusters: Sequence[str]) -> tuple[float, float] | None:
    r"""
    Return the 95 % interval of the difference over images, by bootstrap, for these trained models.

    Args:
        reference, arm (`Mapping[int, Sequence[float]]`): seed → score of each question.
        clusters (`Sequence[str]`): the image of each question.

    Returns:
        `tuple[float, float]`, or None without a seed that both have.
    """
    seeds = sorted(set(reference) & set(arm))
    if not seeds:
        return None
    differences = np.mean([np.subtract(arm[seed], reference[seed]) for seed in seeds], axis=0)
    return bootstrap_interval(differences.tolist(), clusters, bounds=DIFFERENCE_BOUNDS)


def compare_arms(
    runs: Sequence[dict],
    arms: Sequence[str],
    reference: str,
    scores: Mapping[tuple[str, int], Mapping[str, Sequence[float]]],
    clusters: Sequence[str],
) -> list[Comparison]:
    r"""
    Return a comparison for each metric and arm, sorted by metric.

    Args:
        runs (`Sequence[dict]`): `arm`, `seed` and `metrics` of finished runs.
        arms (`Sequence[str]`): names of the arms in their order.
        reference (`str`): name of the reference.
        scores (`Mapping`): (arm, seed) → metric → score of each question, for metrics that are means over questions.
        clusters (`Sequence[str]`): the image of each question.
    """

    def scores_of(arm: str, metric: str) -> Scores:
        return {
            seed: by_metric[metric]
            for (name, seed), by_metric in scores.items()
            if name == arm and metric in by_metric
        }

    comparisons = []
    for metric in dict.fromkeys(name for run in runs for name in run["metrics"]):
        values: dict[str, dict[int, float]] = {arm: {} for arm in arms}
        for run in runs:
            if metric in run["metrics"]:
                values[run["arm"]][run["seed"]] = run["metrics"][metric]
        for arm in arms:
            if not values[arm]:
                continue
            comparison = describe_seeds(metric, arm, values[arm])
            if arm != reference:
                comparison.difference = paired_difference(values[reference], values[arm])
                comparison.image_interval = image_interval(
                    scores_of(reference, metric), scores_of(arm, metric), clusters
                )
            comparisons.append(comparison)
    return comparisons


def describe_seeds(metric: str, arm: str, values: dict[int, float]) -> Comparison:
    """Return the mean and the standard deviation of a metric over the seeds, without a difference."""
    numbers = list(values.values())
    sd = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return Comparison(metric, arm, values, float(np.mean(numbers)), sd)


def format_table(comparisons: Sequence[Comparison], reference: str) -> str:
    """Return a Markdown table with a line for each metric and arm."""
    header = ["metric", "arm", "seeds", "mean (sd)", f"minus {reference}"]
    header += ["95 % over seeds", "95 % over images", "difference"]
    rows = []
    for comparison in comparisons:
        metric, difference = comparison.metric, comparison.difference
        mean = f"{_number(metric, comparison.mean)} ({_number(metric, comparison.sd)})"
        cells = [metric, comparison.arm, str(len(comparison.values)), mean]
        if difference is None:
            cells += ["reference", "", "", ""]
        else:
            over_seeds = None
            if difference.low is not None and difference.high is not None:
                over_seeds = difference.low, difference.high
            cells.append(_number(metric, difference.value, signed=True))
            cells += [_interval(metric, over_seeds), _interval(metric, comparison.image_interval)]
            cells.append(difference.reading)
        rows.append(cells)
    return markdown_table(header, rows)


def _number(metric: str, value: float | None, signed: bool = False) -> str:
    if value is None:
        return "–"
    sign = "+" if signed else ""
    return f"{value:{sign}.1%}" if metric.startswith("accuracy") else f"{value:{sign}.4g}"


def _interval(metric: str, bounds: tuple[float, float] | None) -> str:
    return "–" if bounds is None else " – ".join(_number(metric, bound, signed=True) for bound in bounds)
