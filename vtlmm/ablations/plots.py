# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Plots of a grid: each arm's difference to the reference, seed by seed; each arm on other kinds of images."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def save_differences(path: Path, lines: list[dict], reference: str, title: str) -> None:
    r"""
    A panel for each figure; a point a seed, a bar for the 95 % interval over seeds.

    Args:
        lines (`list[dict]`): of `paired.compare_arms`.
    """
    figures = list(dict.fromkeys(line["figure"] for line in lines))
    arms = [arm for arm in dict.fromkeys(line["arm"] for line in lines) if arm != reference]
    columns = min(3, len(figures))
    rows = -(-len(figures) // columns)
    figure = Figure(figsize=(4.6 * columns, (1.0 + 0.42 * max(1, len(arms))) * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat:
        axes.set_axis_off()
    of_reference = {line["figure"]: line["values"] for line in lines if line["arm"] == reference}
    for axes, name in zip(grid.flat, figures, strict=False):
        axes.set_axis_on()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(f"{name} − {reference}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_yticks(range(len(arms)), arms)
        axes.set_ylim(max(1, len(arms)) - 0.5, -0.5)
        for line in lines:
            if line["figure"] != name or line["arm"] == reference:
                continue
            place, base = arms.index(line["arm"]), of_reference.get(name, {})
            points = [value - base[seed] for seed, value in line["values"].items() if seed in base]
            axes.plot(points, [place] * len(points), "o", markersize=4, alpha=0.5, color="tab:blue")
            if line["low"] is not None:
                axes.plot([line["low"], line["high"]], [place, place], color="tab:red", linewidth=2)
                axes.plot(line["difference"], place, "|", color="tab:red", markersize=12)
    figure.suptitle(title, fontsize=9)
    FigureCanvasAgg(figure).print_png(str(path))


def save_others(path: Path, lines: list[dict], title: str) -> None:
    r"""
    A panel for each figure, in it the sets of images; a point a seed, a bar for the 95 % interval over images.

    Args:
        lines (`list[dict]`): of `others.summarize_others`.
    """
    figures, sets, arms = (list(dict.fromkeys(line[key] for line in lines)) for key in ("figure", "set", "arm"))
    columns = min(3, len(figures))
    rows = -(-len(figures) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(figures) :]:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, figures, strict=False):
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_xticks(range(len(sets)), sets)
        for line in (line for line in lines if line["figure"] == name):
            arm = arms.index(line["arm"])
            place, color = sets.index(line["set"]) + 0.6 * ((arm + 0.5) / len(arms) - 0.5), f"C{arm}"
            axes.plot(
                [place] * len(line["values"]), line["values"].values(), "o", markersize=3, alpha=0.5, color=color
            )
            if line["low"] is not None:
                axes.plot([place, place], [line["low"], line["high"]], color=color, linewidth=2)
    for arm, name in enumerate(arms):
        grid.flat[0].plot([], [], color=f"C{arm}", label=name)
    grid.flat[0].legend(fontsize=6)
    figure.suptitle(title, fontsize=9)
    FigureCanvasAgg(figure).print_png(str(path))
