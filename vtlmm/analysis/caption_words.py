# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure whether visual tokens name what captioned images show."""

from dataclasses import dataclass

import torch
from datasets import Dataset, Image, List
from tqdm.auto import tqdm

from vtlmm.data.images import prepare_images
from vtlmm.data.markdown import markdown_table
from vtlmm.evaluation.statistics import DIFFERENCE_BOUNDS, SCORE_BOUNDS, Estimate, mean_estimate

from .metrics import entropy
from .vocabulary import content_words, vocabulary_words


TOP_K = 10


@dataclass
class CaptionWords:
    """
    Result of [`measure_caption_words`]: shares of images (or patches) in 0 to 1, with 95 % intervals over images.

    The word of an image is the most likely word of the mean of its visual tokens. `shuffled` compares the same words
    with the captions of another image.

    Args:
        top_word, top_word_shuffled ([`Estimate`]): the image's word is in its captions.
        top_10, top_10_shuffled ([`Estimate`]): one of the image's ten most likely words is.
        patch_word, patch_word_shuffled ([`Estimate`]): share of patches whose most likely word is.
        top_word_lift, patch_word_lift ([`Estimate`]): paired differences to `shuffled`.
        num_patch_words (`int`): different most likely words of all patches.
        entropy ([`Estimate`]): mean entropy of the visual tokens, in nats.
    """

    top_word: Estimate
    top_word_shuffled: Estimate
    top_word_lift: Estimate
    top_10: Estimate
    top_10_shuffled: Estimate
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
            own, other = getattr(self, name), getattr(self, f"{name}_shuffled")
            rows.append([label, _percent(own), _percent(other)])
        table = markdown_table(["", "its captions", "another image's captions"], rows)
        return (
            f"{table}\n\n{self.top_word.n} images, {self.num_patch_words} different patch words, "
            f"entropy {self.entropy.value:.2f} nats."
        )


@torch.inference_mode()
def measure_caption_words(model, processor, rows: Dataset, *, batch_size: int = 16) -> CaptionWords:
    r"""
    Compare the words of visual tokens with captions, and with the captions of the next image in `rows`.

    Args:
        rows ([`~datasets.Dataset`]): rows of [`load_rows`] with one image each that the model was not trained on.
            The answers are the captions. Rows of one image are merged by their order: give each image one row.
        batch_size (`int`, *optional*, defaults to 16): images per pass of the vision tower.

    Raises:
        `ValueError`: if fewer than two rows have one image and a caption with a content word.
    """
    rows = rows.select_columns(["messages", "images"]).cast_column("images", List(Image(decode=False)))
    captioned = [(row["images"][0], _caption_words(row)) for row in rows if len(row["images"]) == 1]
    captioned = [(image, words) for image, words in captioned if words]
    if len(captioned) < 2:
        raise ValueError(
            f"{len(captioned)} of {len(rows)} rows have one image and an answer with a content word. Caption words "
            "need at least two."
        )
    vocabulary = [word.lower() for word in vocabulary_words(processor.tokenizer, model.config.visual_vocab_size)]
    scores: dict[str, list[float]] = {
        name: [] for name in ("top_word", "top_10", "patch_word") for name in (name, f"{name}_shuffled")
    }
    entropies, patch_words = [], set()
    for start in tqdm(range(0, len(captioned), batch_size), desc="Caption words"):
        batch = captioned[start : start + batch_size]
        images = prepare_images([image for image, _ in batch], processor.image_processor)
        pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixel_values.to(model.device, model.dtype)).image_features
        for offset, probabilities in enumerate(model.model.vm_head(features).float().softmax(-1)):
            image_words = [vocabulary[i] for i in probabilities.mean(0).topk(TOP_K).indices.tolist()]
            words = [vocabulary[i] for i in probabilities.argmax(-1).tolist()]
            patch_words.update(words)
            entropies.append(entropy(probabilities).mean().item())
            own, other = batch[offset][1], captioned[(start + offset + 1) % len(captioned)][1]
            for suffix, caption in (("", own), ("_shuffled", other)):
                scores[f"top_word{suffix}"].append(image_words[0] in caption)
                scores[f"top_10{suffix}"].append(not caption.isdisjoint(image_words))
                scores[f"patch_word{suffix}"].append(sum(word in caption for word in words) / len(words))
    estimates = {name: mean_estimate(values, bounds=SCORE_BOUNDS) for name, values in scores.items()}
    for name in ("top_word", "patch_word"):
        pairs = zip(scores[name], scores[f"{name}_shuffled"], strict=True)
        estimates[f"{name}_lift"] = mean_estimate((own - other for own, other in pairs), bounds=DIFFERENCE_BOUNDS)
    return CaptionWords(**estimates, num_patch_words=len(patch_words), entropy=mean_estimate(entropies))


def _caption_words(row: dict) -> set[str]:
    answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    return content_words([part["text"] for content in answers for part in content if part["text"]])


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} % ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"
