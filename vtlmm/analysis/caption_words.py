# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure whether visual tokens name what captioned images show."""

from collections import Counter
from dataclasses import dataclass

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from vtlmm.data.images import prepare_images
from vtlmm.data.markdown import markdown_table
from vtlmm.evaluation.statistics import DIFFERENCE_BOUNDS, SCORE_BOUNDS, Estimate, mean_estimate

from .captions import captioned_images
from .metrics import entropy
from .vocabulary import vocabulary_words


TOP_K = 10


@dataclass
class CaptionWords:
    """
    Result of [`measure_caption_words`]: shares of images (or patches) in 0 to 1, with 95 % intervals over images.

    The word of an image is the most likely word of the mean of its visual tokens. `shuffled` compares the same words
    with the captions of every other image and averages.

    Args:
        top_word, top_word_shuffled ([`Estimate`]): the image's word is in its captions.
        top_10, top_10_shuffled ([`Estimate`]): one of the image's ten most likely words is.
        patch_word, patch_word_shuffled ([`Estimate`]): share of patches whose most likely word is.
        top_word_lift, top_10_lift, patch_word_lift ([`Estimate`]): paired differences to `shuffled`.
        num_patch_words (`int`): different most likely words of all patches.
        entropy ([`Estimate`]): mean entropy of the visual tokens, in nats.
    """

    top_word: Estimate
    top_word_shuffled: Estimate
    top_word_lift: Estimate
    top_10: Estimate
    top_10_shuffled: Estimate
    top_10_lift: Estimate
    patch_word: Estimate
    patch_word_shuffled: Estimate
    patch_word_lift: Estimate
    num_patch_words: int
    entropy: Estimate

    def format(self) -> str:
        """Return the result as a Markdown table."""
        rows = []
        for label, name in (
            ("most likely word of the image", "top_word"),
            ("one of the ten most likely words", "top_10"),
            ("most likely word of a patch", "patch_word"),
        ):
            own_estimate, other_estimate = getattr(self, name), getattr(self, f"{name}_shuffled")
            rows.append([label, _percent(own_estimate), _percent(other_estimate)])
        table = markdown_table(["", "its captions", "another image's captions"], rows)
        return (
            f"{table}\n\n{self.top_word.n} images, {self.num_patch_words} different patch words, "
            f"entropy {self.entropy.value:.2f} nats."
        )


@torch.inference_mode()
def measure_caption_words(model, processor, rows: Dataset, *, batch_size: int = 16) -> CaptionWords:
    r"""
    Compare the words of visual tokens with captions, and with the captions of the other images.

    Args:
        rows ([`~datasets.Dataset`]): rows of [`load_rows`] with one image each that the model was not trained on.
            The answers are the captions. Rows about one image are merged.
        batch_size (`int`, *optional*, defaults to 16): images per pass of the vision tower.

    Raises:
        `ValueError`: if fewer than two images have a caption with a content word.
    """
    images = captioned_images(rows)
    if len(images) < 2:
        raise ValueError(
            f"{len(images)} images have a caption with a content word. Caption words need at least two. Add rows "
            "with one image and a caption each."
        )
    vocabulary = [word.lower() for word in vocabulary_words(processor.tokenizer, model.config.visual_vocab_size)]
    image_words: list[list[str]] = []  # most likely words of each image, best first
    patch_words: list[list[str]] = []  # most likely word of each patch of each image
    entropies = []
    for start in tqdm(range(0, len(images), batch_size), desc="Caption words"):
        batch = prepare_images([one.image for one in images[start : start + batch_size]], processor.image_processor)
        pixel_values = processor.image_processor(batch, return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixel_values.to(model.device, model.dtype)).image_features
        for probabilities in model.model.vm_head(features).float().softmax(-1):
            image_words.append([vocabulary[i] for i in probabilities.mean(0).topk(TOP_K).indices.tolist()])
            patch_words.append([vocabulary[i] for i in probabilities.argmax(-1).tolist()])
            entropies.append(entropy(probabilities).mean().item())
    captions = [one.words for one in images]
    counts = Counter(word for caption in captions for word in caption)  # in how many captions each word is
    estimates = {
        **_estimates("top_word", [_share_in(captions, counts, i, words[:1]) for i, words in enumerate(image_words)]),
        **_estimates("top_10", [_any_in(captions, i, set(words)) for i, words in enumerate(image_words)]),
        **_estimates("patch_word", [_share_in(captions, counts, i, words) for i, words in enumerate(patch_words)]),
    }
    num_patch_words = len({word for words in patch_words for word in words})
    return CaptionWords(**estimates, num_patch_words=num_patch_words, entropy=mean_estimate(entropies))


def _share_in(captions: list[set[str]], counts: Counter, index: int, words: list[str]) -> tuple[float, float]:
    """Return the share of `words` in the captions of image `index`, and its mean over all other images."""
    num_own = sum(word in captions[index] for word in words)
    mean_num_others = (sum(counts[word] for word in words) - num_own) / (len(captions) - 1)
    return num_own / len(words), mean_num_others / len(words)


def _any_in(captions: list[set[str]], index: int, words: set[str]) -> tuple[float, float]:
    """Return whether one of `words` is in the captions of image `index`, and its mean over all other images."""
    hits = [not caption.isdisjoint(words) for caption in captions]
    return float(hits[index]), (sum(hits) - hits[index]) / (len(hits) - 1)


def _estimates(name: str, scores: list[tuple[float, float]]) -> dict[str, Estimate]:
    """Return the estimates of a score, of its shuffled control and of their paired difference."""
    return {
        name: mean_estimate((own_score for own_score, _ in scores), bounds=SCORE_BOUNDS),
        f"{name}_shuffled": mean_estimate((other_score for _, other_score in scores), bounds=SCORE_BOUNDS),
        f"{name}_lift": mean_estimate(
            (own_score - other_score for own_score, other_score in scores), bounds=DIFFERENCE_BOUNDS
        ),
    }


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} % ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"
