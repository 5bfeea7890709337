# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Images: the words of each patch over the image, and the curves of a training."""

from pathlib import Path

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .patch_features import grid_side, patch_words, shown_image
from .visual_tokens import VOICES


def draw_patch_words(axes, image: np.ndarray, words: list[str], probabilities: torch.Tensor) -> None:
    """Writes each patch's word over it; the fainter, the less likely."""
    side = grid_side(len(words))
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
    outline = [patheffects.withStroke(linewidth=1.6, foreground="white")]
    for i, (word, probability) in enumerate(zip(words, probabilities.tolist(), strict=True)):
        x, y = (i % side + 0.5) * width / side, (i // side + 0.5) * height / side
        size = max(3.5, min(9.0, 46 / side))
        style = {"fontsize": size, "alpha": 0.25 + 0.75 * probability, "path_effects": outline}
        axes.text(x, y, word, ha="center", va="center", parse_math=False, **style)  # "$$" is a word, no formula
    for i in range(1, side):
        axes.axvline(i * width / side, color="white", linewidth=0.4)
        axes.axhline(i * height / side, color="white", linewidth=0.4)
    axes.set_axis_off()


def save_patch_words(path: Path, model, processor, images: list, titles: list[str], columns: int = 4) -> None:
    """One PNG with the words of the patches of several images, a title over each."""
    words, probabilities = patch_words(model, processor, images)
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.7 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, word, probability, title in zip(grid.flat, images, words, probabilities, titles, strict=False):
        draw_patch_words(axes, shown_image(processor, image), word, probability)
        axes.set_title(title.replace("$", r"\$"), fontsize=8, wrap=True)  # wrapping knows no parse_math
    FigureCanvasAgg(figure).print_png(str(path))


def save_tokens_figure(path: Path, image: np.ndarray, tokens: dict, title: str) -> None:
    r"""
    One PNG: the words of a image's patches by the VM head, by the decoder and by their pseudo image features, and
    the entropy of the visual tokens.

    Args:
        image (`np.ndarray`): of `patches.shown_image`.
        tokens (`dict`): of one image, of `visual_tokens.patch_tokens`.
    """
    figure = Figure(figsize=(11, 11.4), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for voice, (name, _) in VOICES.items():
        axes, leading = next(panels), [words[0] for words in tokens[voice]]
        strength = torch.tensor([value for _, value in leading]).clamp(0, 1)
        draw_patch_words(axes, image, [word for word, _ in leading], strength)
        axes.set_title(name, fontsize=10)
    axes, side = next(panels), grid_side(len(tokens["entropy"]))
    drawn = axes.imshow(np.reshape(tokens["entropy"], (side, side)), cmap="viridis", vmin=0)
    axes.set_title("entropy of the visual token (nats)", fontsize=10)
    axes.set_axis_off()
    figure.colorbar(drawn, ax=axes, shrink=0.8)
    figure.suptitle(title, fontsize=11, parse_math=False)
    FigureCanvasAgg(figure).print_png(str(path))


def save_curves(path: Path, histories: dict[str, list[dict]]) -> None:
    """One PNG with the losses and the entropies of the visual tokens, stage after stage, from `log_history`s."""
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
