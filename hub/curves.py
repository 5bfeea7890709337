# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The losses of a training as a image for its card."""

from pathlib import Path


CURVES_FILE = "curves.png"
PANELS = {"lm_loss": "language loss (nats)", "visual_loss": "visual loss (nats)"}


def draw_curves(runs: list[dict], path: Path) -> bool:
    r"""
    Draw both losses over the optimizer steps, one stage after the other; held-out losses as dots. Whether there is a
    image: not without logs, and not without matplotlib, which is an extra.

    Args:
        runs (`list[dict]`): the record of the training; of each the `curves`, name to list of `[step, nats]`.
    """
    panels = [name for name in PANELS if any(run.get("curves", {}).get(name) for run in runs)]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        panels = []
    if not panels:
        return path.is_file()
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        start = 0
        for run in runs:
            for key, style, label in ((name, "-", run["stage"]), (f"eval_{name}", "o", f"{run['stage']}, held out")):
                points = run.get("curves", {}).get(key)
                if points:
                    axes.plot(*zip(*((start + step, nats) for step, nats in points), strict=True), style, label=label)
            start += run["steps"]
        axes.set_title(PANELS[name], fontsize=9)
        axes.set_xlabel("optimizer steps")
        axes.legend(fontsize=6)
    FigureCanvasAgg(figure).print_png(str(path))
    return True
