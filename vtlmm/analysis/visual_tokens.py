# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What every patch of a image says: as JSON, as a page to hover over, and as a drawing (see `figures.py`)."""

import html
import json
from pathlib import Path

import torch
from PIL import Image

from vtlmm.evaluation.report import data_uri

from .metrics import cosine_scores, entropy, word_probabilities
from .patch_features import grid_side, heads, read_patches


TOKENS_FILE, TOKENS_PAGE = "tokens.json", "tokens.html"
# Whose words: title for people, and what the number beside a word is
VOICES = {
    "vm_head": ("VM head", "probability"),
    "decoder": ("decoder's prediction", "probability"),
    "pseudo": ("nearest to the pseudo image feature", "cosine"),
}
STYLE = """
body { font: 15px/1.4 sans-serif; margin: 2em; }
.images { display: flex; flex-wrap: wrap; gap: 1em; margin-bottom: 3em; }
.image { position: relative; width: 30em; height: 30em; background-size: 100% 100%; image-rendering: pixelated; }
.patch { position: absolute; display: flex; align-items: center; justify-content: center; outline: 1px solid #8886; }
.patch > b { font-size: 0.7em; font-weight: normal; background: #fffb; padding: 0 0.2em; }
.patch:hover { outline: 2px solid #c33; z-index: 2; }
.patch > div { display: none; position: absolute; top: 100%; left: 0; z-index: 3; background: #fff; padding: 0.5em;
  border: 1px solid #999; white-space: nowrap; font-size: 0.85em; pointer-events: none; }
.patch.right > div { left: auto; right: 0; }
.patch:hover > div { display: flex; gap: 1em; }
th { text-align: left; }
"""


def patch_tokens(model, processor, images: list, top_k: int = 5) -> list[dict]:
    r"""
    The words of every patch by the VM head, by the decoder's own prediction (from the hidden state left of the patch)
    and by the cosine of its pseudo image feature to the word embeddings.

    Args:
        images (`list`): images from PIL, in RGB; read one at a time.
        top_k (`int`, *optional*, defaults to 5)

    Returns:
        `list[dict]`: for each image, `vm_head`, `decoder`, `pseudo`: for each patch in raster order, a list of
        (word, its probability or cosine), best first; `entropy` and `decoder_entropy` of each patch, in nats.

    Raises:
        `ValueError`: for a `top_k` that the vocabulary does not have.
    """
    vm_weight, lm_weight, embeddings = heads(model)
    if not 1 <= top_k <= len(vm_weight):
        raise ValueError(f"top_k is {top_k}; a visual token has 1 to {len(vm_weight)} words.")
    found = []
    for image in images:
        patches = read_patches(model, processor, [image])
        with torch.inference_mode():
            p = word_probabilities(patches.mixed_features[0], vm_weight)
            q = word_probabilities(patches.left_states[0], lm_weight)
            scores = {"vm_head": p, "decoder": q}
            scores["pseudo"] = cosine_scores(p.to(embeddings.dtype) @ embeddings, embeddings)
            found.append(
                {
                    **{voice: _top_words(processor, scores[voice], top_k) for voice in VOICES},
                    "entropy": [round(value, 4) for value in entropy(p).tolist()],
                    "decoder_entropy": [round(value, 4) for value in entropy(q).tolist()],
                }
            )
    return found


def _top_words(processor, scores: torch.Tensor, top_k: int) -> list[list[tuple[str, float]]]:
    values, ids = scores.topk(top_k)
    rows = zip(processor.visual_words(ids), values.tolist(), strict=True)
    return [[(word, round(value, 4)) for word, value in zip(*row, strict=True)] for row in rows]


# ---- The page: one file that needs no other ----


def _tables(tokens: dict, i: int) -> str:
    parts = []
    for voice, (title, number) in VOICES.items():
        rows = "".join(f"<tr><td>{html.escape(word)}<td>{value:.3f}" for word, value in tokens[voice][i])
        parts.append(f"<table><tr><th>{title}<th>{number}{rows}</table>")
    return "".join(parts)


def _grid(tokens: dict, background: str, of_entropy: bool, most: float) -> str:
    """A image with its patches over it; `of_entropy` shades them instead of showing their words."""
    side = grid_side(len(tokens["entropy"]))
    cells = []
    for i, value in enumerate(tokens["entropy"]):
        row, column = divmod(i, side)
        place = f"left:{100 * column / side:.3f}%;top:{100 * row / side:.3f}%"
        place += f";width:{100 / side:.3f}%;height:{100 / side:.3f}%"
        shade = f";background:rgba(70,0,110,{value / most:.3f})" if of_entropy else ""
        word, probability = tokens["vm_head"][i][0]
        label = f"{value:.1f}" if of_entropy else html.escape(word)
        label = f'<b style="opacity:{1 if of_entropy else 0.3 + 0.7 * probability:.2f}">{label}</b>'
        if side > 16:  # no room for words
            label = ""
        # to where there is room: beside the words stands the other grid, and beside that one perhaps nothing
        kind = "patch right" if of_entropy and column >= side / 2 else "patch"
        words = _tables(tokens, i)
        cells.append(f'<div class="{kind}" style="{place}{shade}">{label}<div>{words}</div></div>')
    image = "" if of_entropy else f"background-image:url({background})"
    return f'<div class="image" style="{image}">{"".join(cells)}</div>'


def tokens_page(names: list[str], shown: list, tokens: list[dict]) -> str:
    r"""
    HTML with each image: hover over a patch to see its words. Beside it the entropy of its visual tokens.

    Args:
        names (`list[str]`), shown (`list[numpy.ndarray]`): images as `patches.shown_image` gives them.
        tokens (`list[dict]`): of [`patch_tokens`].
    """
    parts = []
    for name, image, own in zip(names, shown, tokens, strict=True):
        most = max(*own["entropy"], 1e-6)
        mean = sum(own["entropy"]) / len(own["entropy"])
        uri = data_uri(Image.fromarray((image * 255).round().astype("uint8")))
        grids = _grid(own, uri, False, most) + _grid(own, uri, True, most)
        parts.append(
            f"<h2>{html.escape(name)}</h2><p>Left, the likeliest word of each patch; right, the entropy of its visual "
            f"token, {min(own['entropy']):.2f} to {most:.2f} nats, mean {mean:.2f}. Hover over a patch.</p>"
            f'<div class="images">{grids}</div>'
        )
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>Visual tokens</title><style>{STYLE}</style></head>'
        f"<body><h1>Visual tokens</h1>{''.join(parts)}</body></html>\n"
    )


def save_tokens(folder: str | Path, names: list[str], shown: list, tokens: list[dict], about: dict) -> None:
    """`tokens.json` and `tokens.html`."""
    folder = Path(folder)
    images = [{"image": name, **own} for name, own in zip(names, tokens, strict=True)]
    text = json.dumps({**about, "images": images}, ensure_ascii=False)
    (folder / TOKENS_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / TOKENS_PAGE).write_text(tokens_page(names, shown, tokens), encoding="utf-8")
