# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The training section of a model card, from the entries of `vtlmm_run.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .private_values import escape_cell, escape_code, published_name, remove_private_values
from .repository import is_hub_id


Run = dict[str, Any]

STAGE_COLUMNS = (
    *("stage", "start", "data", "rows", "steps", "epochs", "learning rate", "hardware", "hours"),
    "held-out losses (nats)",
)

CURVES_FILE = "curves.png"
PANELS = {
    "lm_loss": "language loss (nats)",
    "visual_loss": "visual loss (nats)",
    "visual_token_entropy": "entropy of visual tokens (nats)",
}
# Settings that the table of stages has already, or that do not affect the weights.
NOT_LISTED = {"model_name_or_path", "model_revision", "dataset_name", "eval_dataset", "image_folder", "output_dir"}
NOT_LISTED |= {"stage", "learning_rate", "resume_from_checkpoint", "cache_image_features", "disable_tqdm", "overwrite"}


def training_data(runs: Sequence[Run]) -> list[str]:
    """Return the names of the training data sets in the order of the stages; the file name of a local file."""
    names = (name for run in runs for name in _dataset_names(run["settings"]))
    return list(dict.fromkeys(published_name(name) for name in names))


def hub_datasets(runs: Sequence[Run]) -> list[str]:
    """Return the Hub ids of the training data sets."""
    return list(dict.fromkeys(name for run in runs for name in _dataset_names(run["settings"]) if is_hub_id(name)))


def _dataset_names(settings: dict[str, Any]) -> list[str]:
    """Return the data sets of one run: `dataset_name` is a name or, in a mixture, a list of names or mappings."""
    names = settings.get("dataset_name") or []
    items = [names] if isinstance(names, (str, dict)) else names
    return [str(item.get("name", item)) if isinstance(item, dict) else str(item) for item in items]


def stage_table(runs: Sequence[Run]) -> list[list[str]]:
    """Return header and one row per stage: data, duration and held-out losses. Columns without values are left out."""
    rows = []
    for run in runs:
        settings, metrics = run["settings"], run.get("metrics", {})
        losses = [
            f"{key.removeprefix('eval_')} {value:.3g}" for key, value in metrics.items() if key.endswith("_loss")
        ]
        start = settings.get("model_name_or_path")
        cells = [
            run["stage"],
            published_name(start) if start else "",
            ", ".join(published_name(name) for name in _dataset_names(settings)),
            run.get("rows") or "streamed",
            run["steps"],
            "" if run.get("epochs") is None else f"{run['epochs']:.3g}",
            f"{run['learning_rate']:g}",
            f"{run['processes']} × {run['device']}",
            f"{run['seconds'] / 3600:.2g}" if run.get("seconds") else "",
            ", ".join(losses),
        ]
        rows.append([escape_cell(cell) for cell in cells])
    columns = [column for column in zip(STAGE_COLUMNS, *rows, strict=True) if any(column[1:])]
    return [list(row) for row in zip(*columns, strict=True)]


def settings_table(runs: Sequence[Run]) -> list[list[str]]:
    """Return one row per setting: its name and its value in each stage."""
    columns = [remove_private_values(run["settings"]) for run in runs]
    names = [name for name in dict.fromkeys(name for column in columns for name in column) if name not in NOT_LISTED]

    def cell(value: Any) -> str:
        return escape_cell(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

    return [
        [escape_cell(name), *(cell(column[name]) if name in column else "" for column in columns)] for name in names
    ]


def plans(runs: Sequence[Run]) -> str:
    """Return the losses and trainable modules of each stage, as they were logged."""
    return escape_code("\n\n".join("\n".join(run["plan"]) for run in runs))


def software(runs: Sequence[Run]) -> str:
    """Return the versions and the commit of the last stage."""
    versions = [f"{name} {number}" for name, number in runs[-1].get("versions", {}).items()]
    commit = [f"commit {runs[-1]['commit']}"] if runs[-1].get("commit") else []
    return escape_cell(", ".join([*versions, *commit]))


def plot_curves(runs: Sequence[Run], path: Path) -> bool:
    r"""
    Plot the logged losses over the optimizer steps, one stage after the other; held-out losses as dots.

    Args:
        runs (`list[dict]`): of each `stage`, `steps` and `curves`, a dict of name to list of `[step, nats]`.
        path (`Path`): PNG file.

    Returns:
        `bool`: whether the file exists. It is not written without logs, or if matplotlib is not installed.
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
