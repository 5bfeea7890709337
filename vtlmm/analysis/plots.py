# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Plots: the words of each patch over the image, and the losses of a training."""

from pathlib import Path
from typing import Any

import numpy as np


try:
    from matplotlib import patheffects
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("Plots need matplotlib. Install it with `pip install 'vtlmm[figures]'`.") from error

from .patch_features import grid_side, shown_image
from .visual_token_page import LIKELY, opacity
from .visual_tokens import SOURCES, ImageTokens, Words


LEGEND = (
    f"Each patch shows its likeliest whole word. Bold: probability of at least {LIKELY:.0%}. "
    "The fainter a word, the lower its probability."
)
OUTLINE = [patheffects.withStroke(linewidth=2.2, foreground="black")]


def draw_patch_words(
    axes, image: np.ndarray, labels: Words, opacities: list[float] | None = None, correct: list[bool] | None = None
) -> None:
    r"""
    Draw an image with the word of each patch, in white with a dark outline.

    Args:
        axes ([`~matplotlib.axes.Axes`])
        image (`numpy.ndarray` of shape `(height, width, 3)`): From [`~patch_features.shown_image`].
        labels (`Words`): Word and probability of each patch in raster order.
        opacities (`list[float]`, *optional*): Opacity of each word, if it does not follow from the probability.
        correct (`list[bool]`, *optional*): Whether each word is correct. Wrong words get an orange frame.
    """
    side = grid_side(len(labels))
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
    size = axes.get_position().width * axes.figure.get_figwidth() * 72 / side  # points per patch
    for i, (word, probability) in enumerate(labels):
        x, y = (i % side + 0.5) * width / side, (i // side + 0.5) * height / side
        alpha = opacities[i] if opacities else opacity(probability)
        box: dict[str, Any] = {"boxstyle": "round,pad=0.2", "facecolor": (0, 0, 0, 0.4 * alpha), "edgecolor": "none"}
        if correct and not correct[i]:
            box |= {"edgecolor": "darkorange", "linewidth": 1.5}
        axes.text(
            x, y, word, ha="center", va="center", color=(1, 1, 1, alpha), clip_on=True, path_effects=OUTLINE, bbox=box,
            fontsize=max(3.0, min(11.0, 1.55 * size / max(len(word), 4))),
            fontweight="bold" if probability >= LIKELY else "normal",
            parse_math=False,  # "$$" is a word, not a formula
        )  # fmt: skip
    for i in range(1, side):
        axes.axvline(i * width / side, color="gray", linewidth=0.5, alpha=0.6)
        axes.axhline(i * height / side, color="gray", linewidth=0.5, alpha=0.6)
    axes.set_axis_off()


def save_patch_words(
    path: str | Path,
    processor,
    images: list,
    tokens: list[ImageTokens],
    titles: list[str],
    caption: str = "",
    correct: list[list[bool]] | None = None,
    columns: int = 4,
) -> None:
    r"""
    Save one PNG with the words of the patches of several images, a title above each and a caption at the bottom.

    Args:
        path (`str` or `Path`), processor ([`VTLMMProcessor`]), images (`list[PIL.Image.Image]`)
        tokens (`list[ImageTokens]`): Visual tokens of each image.
        titles (`list[str]`): Title of each image.
        caption (`str`, *optional*): Text below the legend.
        correct (`list[list[bool]]`, *optional*): See [`draw_patch_words`].
        columns (`int`, *optional*, defaults to 4): Images per row.
    """
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.75 * lines + 0.75))
    grid = figure.subplots(lines, columns, squeeze=False)
    bottom = 0.75 / figure.get_figheight()
    top = 1 - 0.55 / figure.get_figheight()
    figure.subplots_adjust(left=0.01, right=0.99, top=top, bottom=bottom, hspace=0.2, wspace=0.05)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, (axes, image, title) in enumerate(zip(grid.flat, images, titles, strict=False)):
        marks = correct[i] if correct else None
        draw_patch_words(axes, shown_image(processor, image), tokens[i].labels, correct=marks)
        axes.set_title(title.replace("$", r"\$"), fontsize=10, wrap=True)  # wrapped titles ignore parse_math
    text = "\n".join(filter(None, (LEGEND, caption)))
    figure.text(0.5, bottom / 2, text, ha="center", va="center", fontsize=10, parse_math=False)
    FigureCanvasAgg(figure).print_png(str(path))


def save_visual_token_plot(path: str | Path, image: np.ndarray, tokens: ImageTokens, title: str) -> None:
    r"""
    Save one PNG: the words of an image's patches by the VM head, by the decoder and by the pseudo image features, and
    the entropy of the visual tokens.

    Args:
        image (`numpy.ndarray` of shape `(height, width, 3)`): From [`~patch_features.shown_image`].
        tokens ([`ImageTokens`]): Visual tokens of the image.
    """
    figure = Figure(figsize=(11, 12.2))
    panels = figure.subplots(2, 2).flat
    figure.subplots_adjust(left=0.02, right=0.98, top=0.9, bottom=0.12, hspace=0.1, wspace=0.05)
    labels = {"vm_head": tokens.labels, "decoder": _first(tokens.decoder), "pseudo": _first(tokens.pseudo)}
    for axes, (source, (name, number)) in zip(panels, SOURCES.items(), strict=False):
        cosines = [max(0.0, value) for _, value in labels[source]] if number == "cosine" else None
        draw_patch_words(axes, image, labels[source], cosines)
        axes.set_title(name, fontsize=11)
    axes, side = figure.axes[3], grid_side(len(tokens.entropy))
    drawn = axes.imshow(np.reshape(tokens.entropy, (side, side)), cmap="viridis", vmin=0, vmax=tokens.max_entropy)
    axes.set_title(f"entropy of the visual token: mean {tokens.mean_entropy:.2f} nats", fontsize=11)
    axes.set_axis_off()
    bar = figure.colorbar(drawn, cax=axes.inset_axes((0, -0.06, 1, 0.04)), orientation="horizontal")
    bar.set_label(f"nats (uniform: {tokens.max_entropy:.2f})")
    lines = [title, "In this image: " + ", ".join(f"{word} {value:.0%}" for word, value in tokens.summary)]
    if tokens.is_near_uniform:
        lines.append("This VM head is untrained: its distributions are nearly uniform, so the words are arbitrary.")
    figure.text(0.5, 0.965, "\n".join(lines), ha="center", va="center", fontsize=11, parse_math=False)
    figure.text(0.5, 0.02, LEGEND, ha="center", va="center", fontsize=10)
    FigureCanvasAgg(figure).print_png(str(path))


def _first(words: list[Words]) -> Words:
    return [patch[0] for patch in words]


def save_curves(path: str | Path, histories: dict[str, list[dict]]) -> None:
    """Save one PNG with the losses and the entropy of the visual tokens over all stages, from their `log_history`."""
    panels = {
        "language loss (nats)": ["lm_loss"],
        "visual loss (nats)": ["visual_loss"],
        "entropy (nats)": ["visual_token_entropy", "mean_visual_token_entropy"],
    }
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        offset = 0
        for stage, history in histories.items():
            logs = [entry for entry in history if "step" in entry and "loss" in entry]
            for name, style in zip(names, ("-", ":"), strict=False):
                points = [(offset + entry["step"], entry[name]) for entry in logs if name in entry]
                if points:
                    label = f"{stage}: {name}" if len(names) > 1 else stage
                    axes.plot(*zip(*points, strict=True), style, label=label)
            offset += max((entry["step"] for entry in logs), default=0)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("optimizer steps")
        axes.legend(fontsize=6)
    FigureCanvasAgg(figure).print_png(str(path))
