# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""An HTML page with the visual tokens of images, in one file without external resources."""

from importlib.resources import files

import numpy as np
from jinja2 import Environment
from PIL import Image

from vtlmm.evaluation.report import data_uri

from .patch_features import grid_side
from .visual_tokens import SOURCES, ImageTokens


LIKELY = 0.5  # probability from which a word is bold
MIN_OPACITY = 0.6
# The color map viridis at 0, 1/8, …, 1 as (red, green, blue): a page must not need matplotlib
VIRIDIS = (
    (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128), (94, 201, 98),
    (173, 220, 48), (253, 231, 37),
)  # fmt: skip


def visual_token_page(names: list[str], images: list[np.ndarray], tokens: list[ImageTokens]) -> str:
    r"""
    Return an HTML page with the words and the entropy of every patch.

    Args:
        names (`list[str]`): Title of each image.
        images (`list[numpy.ndarray]`): Images from [`~patch_features.shown_image`], `(height, width, 3)` in 0..1.
        tokens (`list[ImageTokens]`): From [`~visual_tokens.read_visual_tokens`].
    """
    environment = Environment(autoescape=True)
    template = environment.from_string(
        files("vtlmm.analysis").joinpath("templates/visual_tokens.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        title="Visual tokens",
        side=grid_side(len(tokens[0].entropy)),
        likely=LIKELY,
        color_stops=", ".join(f"rgb{color}" for color in VIRIDIS),
        images=[_image(*parts) for parts in zip(names, images, tokens, strict=True)],
    )


def _image(name: str, image: np.ndarray, tokens: ImageTokens) -> dict:
    return {
        "name": name,
        "uri": data_uri(Image.fromarray((image * 255).round().astype("uint8"))),
        "pixelated": max(image.shape) <= 128,
        "patches": [_patch(tokens, i) for i in range(len(tokens.entropy))],
        "summary": tokens.summary,
        "mean_entropy": tokens.mean_entropy,
        "max_entropy": tokens.max_entropy,
        "is_near_uniform": tokens.is_near_uniform,
    }


def _patch(tokens: ImageTokens, i: int) -> dict:
    side = grid_side(len(tokens.entropy))
    row, column = divmod(i, side)
    word, probability = tokens.labels[i]
    return {
        "left": round(100 * column / side, 3),
        "top": round(100 * row / side, 3),
        "place": f"{'right' if column >= side / 2 else 'left'}{' up' if row >= side / 2 else ''}",
        "word": word,
        "likely": probability >= LIKELY,
        "opacity": round(opacity(probability), 2),
        "entropy": tokens.entropy[i],
        "color": color_of(tokens.entropy[i] / tokens.max_entropy),
        "sources": [
            {"title": title, "number": number, "words": getattr(tokens, source)[i]}
            for source, (title, number) in SOURCES.items()
        ],
    }


def opacity(probability: float) -> float:
    """Return the opacity of a word: 1 for likely words, lower for less probable ones."""
    return MIN_OPACITY + (1 - MIN_OPACITY) * min(1.0, probability / LIKELY)


def color_of(share: float) -> str:
    """Return the color of the map viridis at a share from 0 to 1, as CSS."""
    position = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    first = min(int(position), len(VIRIDIS) - 2)
    pairs = zip(VIRIDIS[first], VIRIDIS[first + 1], strict=True)
    return "rgb({}, {}, {})".format(*(round(a + (b - a) * (position - first)) for a, b in pairs))
