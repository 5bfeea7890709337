# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Arms against the reference, paired by seed: differences with their intervals, and what may be said of them."""

import math

import numpy as np

from vtlmm.evaluation.statistics import LEVEL, bootstrap_interval


def t_quantile(level: float, degrees: int) -> float:
    """The t with P(|T| ≤ t) = `level`, T Student's of `degrees` of freedom (Abramowitz and Stegun 26.7.3 and 4)."""

    def within(t: float) -> float:
        angle = math.atan(t / math.sqrt(degrees))
        sine, cosine = math.sin(angle), math.cos(angle)
        odd = degrees % 2
        term = cosine if odd else 1.0
        total = term if degrees > 1 else 0.0
        for k in range(2 + odd, degrees, 2):
            term *= (k - 1) / k * cosine**2
            total += term
        return (angle + sine * total) * 2 / math.pi if odd else sine * total

    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < level else (low, middle)
    return (low + high) / 2


def paired_difference(reference: dict[int, float], arm: dict[int, float]) -> dict:
    r"""
    Mean of arm − reference over the seeds that both have, with its 95 % t interval over seeds.

    Args:
        reference, arm (`dict[int, float]`): seed → figure.

    Returns:
        `dict`: `n` seeds, `difference`, `low` and `high` (None with fewer than two seeds), and `reading` in words. An
        interval that holds 0 is no proof that there is no difference: it reads as "none shown".
    """
    seeds = sorted(set(reference) & set(arm))
    values = np.array([arm[seed] - reference[seed] for seed in seeds])
    found = {"n": len(seeds), "difference": None, "low": None, "high": None, "reading": "no seed in common"}
    if not seeds:
        return found
    found |= {"difference": float(values.mean()), "reading": "one seed: not known"}
    if len(seeds) < 2:
        return found
    half = t_quantile(LEVEL, len(seeds) - 1) * float(values.std(ddof=1)) / math.sqrt(len(seeds))
    low, high = found["difference"] - half, found["difference"] + half
    reading = "higher" if low > 0 else "lower" if high < 0 else "none shown"
    if not values.any():
        reading = "equal with every seed"
    return {**found, "low": low, "high": high, "reading": reading}


def over_images(reference: dict[int, list[float]], arm: dict[int, list[float]], clusters: list[str]):
    """95 % interval of the same difference by bootstrap over images, for these trained models: `(low, high)`.

    Args:
        reference, arm (`dict[int, list[float]]`): seed → score of each question.
        clusters (`list[str]`): the image of each question.
    """
    seeds = sorted(set(reference) & set(arm))
    if not seeds:
        return None, None
    differences = np.mean([np.subtract(arm[seed], reference[seed]) for seed in seeds], axis=0)
    return bootstrap_interval(differences, clusters)


def compare_arms(rows: list[dict], arms: list[str], reference: str, details: dict, clusters: list[str]) -> list[dict]:
    r"""
    Every figure of every arm.

    Args:
        rows (`list[dict]`): `arm`, `seed`, `figures` of finished runs.
        details (`dict`): (arm, seed) → figure → score of each question, for figures that are means over questions.
        clusters (`list[str]`): the image of each question.

    Returns:
        `list[dict]`: `figure`, `arm`, `values` by seed, `mean`, `sd`; of all but the reference also what
        [`paired_difference`] gives, `images_low` and `images_high`.
    """
    lines = []
    for figure in dict.fromkeys(name for row in rows for name in row["figures"]):
        values = {arm: {} for arm in arms}
        for row in rows:
            if figure in row["figures"]:
                values[row["arm"]][row["seed"]] = row["figures"][figure]
        for arm in arms:
            own = list(values[arm].values())
            if not own:
                continue
            line = {"figure": figure, "arm": arm, "values": values[arm], "mean": float(np.mean(own))}
            line["sd"] = float(np.std(own, ddof=1)) if len(own) > 1 else None
            if arm != reference:
                scores = [
                    {seed: found[figure] for (name, seed), found in details.items() if name == a and figure in found}
                    for a in (reference, arm)
                ]
                low, high = over_images(*scores, clusters)
                line |= paired_difference(values[reference], values[arm])
                line |= {"images_low": low, "images_high": high}
            lines.append(line)
    return lines


def _number(figure: str, value: float | None, signed: bool = False) -> str:
    if value is None:
        return "–"
    sign = "+" if signed else ""
    return f"{value:{sign}.1%}" if figure.startswith("accuracy") else f"{value:{sign}.4g}"


def format_table(lines: list[dict], reference: str) -> str:
    """The comparison in Markdown, one line for each figure and arm."""
    text = [
        f"| figure | arm | seeds | mean (sd) | less {reference} | 95 % over seeds | 95 % over images | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        figure = line["figure"]
        cells = [figure, line["arm"], str(len(line["values"]))]
        cells.append(f"{_number(figure, line['mean'])} ({_number(figure, line['sd'])})")
        if line["arm"] == reference:
            cells += ["reference", "", "", ""]
        else:
            cells.append(_number(figure, line["difference"], True))
            for low, high in (("low", "high"), ("images_low", "images_high")):
                known = line[low] is not None
                ends = [_number(figure, line[end], True) for end in (low, high)]
                cells.append(" – ".join(ends) if known else "–")
            cells.append(line["reading"])
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)
