# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Plot a grid: the difference of each arm to the reference, and each arm on out-of-distribution images."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .ood import OODSummary
from .paired_tests import Comparison


MAX_COLUMNS = 3


def save_differences(path: Path, comparisons: Sequence[Comparison], reference: str, title: str) -> None:
    """Save a plot with a panel for each metric: a point for each seed, a bar for the 95 % interval over seeds."""
    metrics = list(dict.fromkeys(comparison.metric for comparison in comparisons))
    arms = [arm for arm in dict.fromkeys(comparison.arm for comparison in comparisons) if arm != reference]
    figure, panels = _panels(len(metrics), row_height=1.0 + 0.42 * max(1, len(arms)), sharey=True)
    reference_values = {c.metric: c.values for c in comparisons if c.arm == reference}
    for axes, metric in zip(panels, metrics, strict=False):
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(f"{metric} − {reference}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(max(1, len(arms)) - 0.5, -0.5)
        for comparison in comparisons:
            if comparison.metric != metric or comparison.arm == reference:
                continue
            y, base = arms.index(comparison.arm), reference_values.get(metric, {})
            points = [value - base[seed] for seed, value in comparison.values.items() if seed in base]
            axes.plot(points, [y] * len(points), "o", markersize=4, alpha=0.5, color="tab:blue")
            difference = comparison.difference
            if difference is not None and difference.low is not None:
                axes.plot([difference.low, difference.high], [y, y], color="tab:red", linewidth=2)
                axes.plot(difference.value, y, "|", color="tab:red", markersize=12)
    figure.suptitle(title, fontsize=9)
    FigureCanvasAgg(figure).print_png(str(path))


def save_ood(path: Path, summaries: Sequence[OODSummary], title: str) -> None:
    """Save a plot with a panel for each metric: a point for each seed, a bar for the 95 % interval over images."""
    metrics = list(dict.fromkeys(summary.metric for summary in summaries))
    sets = list(dict.fromkeys(summary.images for summary in summaries))
    arms = list(dict.fromkeys(summary.arm for summary in summaries))
    figure, panels = _panels(len(metrics), row_height=3.0)
    for axes, metric in zip(panels, metrics, strict=False):
        axes.set_title(metric, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_xticks(range(len(sets)), sets)
        for summary in (summary for summary in summaries if summary.metric == metric):
            arm = arms.index(summary.arm)
            x, color = sets.index(summary.images) + 0.6 * ((arm + 0.5) / len(arms) - 0.5), f"C{arm}"
            values = list(summary.values.values())
            axes.plot([x] * len(values), values, "o", markersize=3, alpha=0.5, color=color)
            axes.plot([x, x], [summary.low, summary.high], color=color, linewidth=2)
    for arm, name in enumerate(arms):
        panels[0].plot([], [], color=f"C{arm}", label=name)
    panels[0].legend(fontsize=6)
    figure.suptitle(title, fontsize=9)
    FigureCanvasAgg(figure).print_png(str(path))


def _panels(number: int, row_height: float, sharey: bool = False):
    """Return a figure and a list of `number` axes, three in each row."""
    columns = min(MAX_COLUMNS, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(4.6 * columns, row_height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for axes in grid.flat[number:]:
        axes.set_axis_off()
    return figure, list(grid.flat[:number])
