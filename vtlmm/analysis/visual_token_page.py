# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""An HTML page with the visual tokens of images, in one file without external resources."""

import unicodedata
from importlib.resources import files

import numpy as np
from jinja2 import Environment
from PIL import Image

from vtlmm.evaluation.samples_page import data_uri

from .patch_features import grid_side
from .visual_tokens import SOURCES, ImageTokens


IMAGE_PIXELS = 448  # longest side of an image on the page
LIKELY = 0.5  # probability from which a word is bold
MIN_OPACITY = 0.7
CELL = 100  # side of a patch in the units of the drawing
SMALLEST_FONT, LARGEST_FONT = 15, 30  # in the units of the drawing
CHARACTER_WIDTH = 0.66  # of a bold lower-case character, relative to the font size
# The color map viridis at 0, 1/8, …, 1 as (red, green, blue): a page must not need matplotlib
VIRIDIS = (
    (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128), (94, 201, 98),
    (173, 220, 48), (253, 231, 37),
)  # fmt: skip


def visual_token_page(
    names: list[str], images: list[np.ndarray], tokens: list[ImageTokens], embedded: bool = False
) -> str:
    r"""
    Return an HTML page that shows the words or the entropy on each image, and the top words of the chosen patch.

    Args:
        names (`list[str]`): Title of each image.
        images (`list[numpy.ndarray]`): Images from [`~patch_features.shown_image`], `(height, width, 3)` in 0..1.
        tokens (`list[ImageTokens]`): From [`~visual_tokens.read_visual_tokens`].
        embedded (`bool`, *optional*, defaults to `False`): Leave out the titles, for a frame of another page.
    """
    environment = Environment(autoescape=True)
    template = environment.from_string(
        files("vtlmm.analysis").joinpath("templates/visual_tokens.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        title="Visual tokens",
        embedded=embedded,
        side=grid_side(len(tokens[0].entropy)),
        cell=CELL,
        likely=LIKELY,
        color_stops=", ".join(f"rgb{color}" for color in VIRIDIS),
        sources=list(SOURCES.values()),
        images=[_image(*parts) for parts in zip(names, images, tokens, strict=True)],
    )


def _image(name: str, image: np.ndarray, tokens: ImageTokens) -> dict:
    return {
        "name": name,
        "uri": data_uri(Image.fromarray((image * 255).round().astype("uint8")), IMAGE_PIXELS),
        "pixelated": max(image.shape) <= 128,
        "patches": [_patch(tokens, i) for i in range(len(tokens.entropy))],
        # What the script shows for the chosen patch: its entropy, and its words of each source
        "details": [
            {"entropy": tokens.entropy[i], "words": [getattr(tokens, source)[i] for source in SOURCES]}
            for i in range(len(tokens.entropy))
        ],
        "summary": tokens.summary,
        "mean_entropy": tokens.mean_entropy,
        "max_entropy": tokens.max_entropy,
        "is_near_uniform": tokens.is_near_uniform,
    }


def _patch(tokens: ImageTokens, i: int) -> dict:
    row, column = divmod(i, grid_side(len(tokens.entropy)))
    word, probability = tokens.labels[i]
    text, font_size = fit_word(word)
    return {
        "x": CELL * column,
        "y": CELL * row,
        "word": text,
        "font_size": font_size,
        "likely": probability >= LIKELY,
        "opacity": round(opacity(probability), 2),
        "color": color_of(tokens.entropy[i] / tokens.max_entropy),
    }


def fit_word(word: str) -> tuple[str, float]:
    """Return a word and the font size with which it fits into a patch. A word that would be too small is cut."""
    widths = [_width(character) for character in word]
    room = 0.95 * CELL / CHARACTER_WIDTH
    size = room / max(1.0, sum(widths))
    if size >= SMALLEST_FONT:
        return word, round(min(size, LARGEST_FONT), 1)
    kept = next(n for n in range(len(word), -1, -1) if (sum(widths[:n]) + 1) * SMALLEST_FONT <= room)
    return word[:kept] + "…", SMALLEST_FONT


def _width(character: str) -> float:
    """Return the width of a character, relative to a lower-case letter."""
    if unicodedata.east_asian_width(character) in "WF":
        return 1.6
    return 1.2 if character.isupper() or character in "mw…@%&" else 1.0


def opacity(probability: float) -> float:
    """Return the opacity of a word: 1 for likely words, lower for less probable ones."""
    return MIN_OPACITY + (1 - MIN_OPACITY) * min(1.0, probability / LIKELY)


def color_of(share: float) -> str:
    """Return the color of the map viridis at a share from 0 to 1, as CSS."""
    position = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    first = min(int(position), len(VIRIDIS) - 2)
    pairs = zip(VIRIDIS[first], VIRIDIS[first + 1], strict=True)
    return "rgb({}, {}, {})".format(*(round(a + (b - a) * (position - first)) for a, b in pairs))
