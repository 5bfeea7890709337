# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The words of the patches of an image, by the VM head, by the decoder and by the pseudo image features."""

import math
from dataclasses import dataclass

import torch
from PIL import Image

from .metrics import cosine_scores, entropy, word_probabilities
from .patch_features import grid_side, heads, read_patches
from .vocabulary import FUNCTION_WORDS, ShownWords, shown_words


# Source of the words: its title, and the number next to a word
SOURCES = {
    "vm_head": ("VM head", "probability"),
    "decoder": ("decoder's prediction", "probability"),
    "pseudo": ("nearest to the pseudo image feature", "cosine"),
}
NEAR_UNIFORM = 0.9  # share of log(V) above which the mean entropy means an untrained head
NUM_SUMMARY_WORDS = 8
NUM_CANDIDATES = 20  # most likely tokens among which the label of a patch is the first whole word

Words = list[tuple[str, float]]  # words with their probability or cosine, best first


@dataclass
class ImageTokens:
    """
    The visual tokens of one image, patches in raster order.

    Args:
        vm_head, decoder, pseudo (`list[Words]`): For each patch its top words: probabilities of the VM head,
            probabilities of the decoder's own prediction from the hidden state left of the patch, and cosines of the
            pseudo image feature to the word embeddings. Control tokens are left out.
        labels (`Words`): The word to show on each patch, with its probability by the VM head: the likeliest whole word
            among the 20 likeliest tokens, or the likeliest token.
        summary (`Words`): Content words with the highest mean probability over the patches.
        entropy, decoder_entropy (`list[float]`): Entropy of each patch's distribution, in nats.
        max_entropy (`float`): Entropy of the uniform distribution over the vocabulary, in nats.
    """

    vm_head: list[Words]
    decoder: list[Words]
    pseudo: list[Words]
    labels: Words
    summary: Words
    entropy: list[float]
    decoder_entropy: list[float]
    max_entropy: float

    @property
    def mean_entropy(self) -> float:
        """Return the mean entropy of the patches in nats."""
        return sum(self.entropy) / len(self.entropy)

    @property
    def is_near_uniform(self) -> bool:
        """Return whether the visual tokens are close to uniform, as those of an untrained VM head."""
        return self.mean_entropy > NEAR_UNIFORM * self.max_entropy


def read_visual_tokens(model, processor, images: list[Image.Image], top_k: int = 5) -> list[ImageTokens]:
    r"""
    Return the visual tokens of each image. Images are processed one at a time.

    Args:
        model ([`VTLMMForConditionalGeneration`]), processor ([`VTLMMProcessor`])
        images (`list[PIL.Image.Image]`): Images in RGB.
        top_k (`int`, *optional*, defaults to 5): Number of words per patch.

    Raises:
        ValueError: If `top_k` is not between 1 and the size of the vocabulary.
    """
    vm_weight, lm_weight, embeddings = heads(model)
    vocab_size = len(vm_weight)
    if not 1 <= top_k <= vocab_size:
        raise ValueError(f"`top_k` is {top_k}. It must be between 1 and {vocab_size}, the size of the vocabulary.")
    words = shown_words(processor.tokenizer, vocab_size)
    results = []
    for image in images:
        patches = read_patches(model, processor, [image])
        with torch.inference_mode():
            p = word_probabilities(patches.mixed_features[0], vm_weight)
            q = word_probabilities(patches.left_states[0], lm_weight)
            cosines = cosine_scores(p.to(embeddings.dtype) @ embeddings, embeddings)
            results.append(
                ImageTokens(
                    vm_head=top_words(p, words, top_k),
                    decoder=top_words(q, words, top_k),
                    pseudo=top_words(cosines, words, top_k),
                    labels=patch_labels(p, words),
                    summary=_summary(p, words),
                    entropy=[round(value, 4) for value in entropy(p).tolist()],
                    decoder_entropy=[round(value, 4) for value in entropy(q).tolist()],
                    max_entropy=math.log(vocab_size),
                )
            )
    return results


def top_words(scores: torch.Tensor, words: ShownWords, top_k: int) -> list[Words]:
    """Return for each row of scores (N, V) its best words that can be shown, with their scores."""
    shown = scores.float().masked_fill(~words.is_shown.to(scores.device), -math.inf)
    values, ids = shown.topk(min(top_k, int(words.is_shown.sum())))
    return [
        [(words.texts[i], round(value, 4)) for i, value in zip(*row, strict=True)]
        for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]


def patch_labels(probabilities: torch.Tensor, words: ShownWords) -> Words:
    """Return the word to show on each patch, from its distribution (N, V): whole words are preferred."""
    shown = probabilities.float().masked_fill(~words.is_shown.to(probabilities.device), -math.inf)
    values, ids = shown.topk(min(NUM_CANDIDATES, int(words.is_shown.sum())))
    labels = []
    for row_ids, row_values in zip(ids.tolist(), values.tolist(), strict=True):
        best = next((j for j, i in enumerate(row_ids) if words.is_whole[i]), 0)
        labels.append((words.texts[row_ids[best]], round(row_values[best], 4)))
    return labels


def _summary(probabilities: torch.Tensor, words: ShownWords) -> Words:
    """Return the content words with the highest mean probability over the patches; upper and lower case are merged."""
    mean = probabilities.float().mean(0)
    values, ids = mean.topk(min(10 * NUM_SUMMARY_WORDS, len(mean)))
    merged: dict[str, float] = {}
    for i, value in zip(ids.tolist(), values.tolist(), strict=True):
        word = words.texts[i].lower()
        if words.is_whole[i] and word not in FUNCTION_WORDS:
            merged[word] = merged.get(word, 0.0) + value
    best = sorted(merged.items(), key=lambda item: -item[1])[:NUM_SUMMARY_WORDS]
    return [(word, round(value, 4)) for word, value in best]


def format_patch_words(model, processor, image: Image.Image, width: int = 80) -> str:
    """Return the likeliest word of each patch of an image as lines of text, laid out as the patches are."""
    [tokens] = read_visual_tokens(model, processor, [image], top_k=1)
    words = [word for word, _ in tokens.labels]
    side = grid_side(len(words))
    column = min(max(map(len, words)), max(2, width // side - 1))
    rows = (words[start : start + side] for start in range(0, len(words), side))
    return "\n".join(" ".join(word[:column].ljust(column) for word in row).rstrip() for row in rows)
