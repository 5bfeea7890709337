# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure whether the decoder reads the image: a caption should be likelier with its own image than with another."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from datasets import Dataset, Image, List
from tqdm.auto import tqdm

from vtlmm.data.encoding import encode_messages
from vtlmm.data.images import image_key, prepare_images
from vtlmm.evaluation.statistics import SCORE_BOUNDS, Estimate, mean_estimate

from .captions import answer_texts
from .vocabulary import content_words


@dataclass
class CaptionMatching:
    """
    Result of [`measure_caption_matching`], with 95 % intervals over the rows.

    Args:
        accuracy ([`Estimate`]): mean of `scores`: how often the caption is likelier with its own image. Chance is 0.5.
        loss, loss_shuffled ([`Estimate`]): mean loss of a caption's tokens with its own and with the other image, in
            nats per token.
        loss_lift ([`Estimate`]): mean of `loss_shuffled` - `loss`.
        scores (`list[float]`): for each row, the share of the other images with which its loss is larger.
    """

    accuracy: Estimate
    loss: Estimate
    loss_shuffled: Estimate
    loss_lift: Estimate
    scores: list[float]

    def format(self) -> str:
        """Return the result as one sentence."""
        return (
            f"The caption is likelier with its own image for {100 * self.accuracy.value:.1f} % "
            f"({100 * self.accuracy.low:.1f} to {100 * self.accuracy.high:.1f}) of {self.accuracy.n} captions; loss "
            f"{self.loss.value:.2f}, with another image {self.loss_shuffled.value:.2f} nats per token."
        )


@torch.inference_mode()
def measure_caption_matching(
    model, processor, rows: Dataset, *, num_others: int = 1, hard: bool = False, batch_size: int = 8
) -> CaptionMatching:
    r"""
    Compare the language loss of each caption with its own image and with other images.

    Args:
        rows ([`~datasets.Dataset`]): rows of [`load_rows`] with one image each, one row per image, which the model
            was not trained on. The answers are the captions.
        num_others (`int`, *optional*, defaults to 1): other images per caption: the images of the next rows.
            `accuracy` is the mean over them.
        hard (`bool`, *optional*, defaults to `False`): whether the other images are those whose captions have the most
            words in common with the caption.
        batch_size (`int`, *optional*, defaults to 8): sequences per forward pass.

    Raises:
        `ValueError`: if a row has another number of images than one, two rows have the same image, or there are too
            few rows.
    """
    check_matching_rows(rows)
    rows = rows.select_columns(["messages", "images"]).cast_column("images", List(Image(decode=False)))
    if not 1 <= num_others < len(rows):
        raise ValueError(f"`num_others` is {num_others}; with {len(rows)} rows it must be 1 to {len(rows) - 1}.")
    was_training = model.training
    model.eval()
    features = _vision_features(model, processor, [row["images"][0] for row in rows], batch_size)
    encoded = [encode_messages(processor, row["messages"]) for row in rows]
    others = _similar_rows(rows, num_others) if hard else _next_rows(len(rows), num_others)
    pairs = [(row, image) for row, images in enumerate(others) for image in (row, *images)]
    losses = []
    for start in tqdm(range(0, len(pairs), batch_size), desc="Caption matching"):
        batch = pairs[start : start + batch_size]
        images = torch.stack([features[image] for _, image in batch]).to(model.device, model.dtype)
        losses += _caption_losses(model, processor, [encoded[row] for row, _ in batch], images).tolist()
    model.train(was_training)
    table = torch.tensor(losses, dtype=torch.float64).view(len(rows), 1 + num_others)
    own_losses, other_losses = table[:, :1], table[:, 1:]
    scores = ((own_losses < other_losses).double() + 0.5 * (own_losses == other_losses).double()).mean(1).tolist()
    return CaptionMatching(
        accuracy=mean_estimate(scores, bounds=SCORE_BOUNDS),
        loss=mean_estimate(own_losses[:, 0].tolist()),
        loss_shuffled=mean_estimate(other_losses.mean(1).tolist()),
        loss_lift=mean_estimate((other_losses.mean(1) - own_losses[:, 0]).tolist()),
        scores=scores,
    )


def check_matching_rows(rows: Dataset) -> None:
    """
    Check that each row has one image, and that no two rows have the same.

    Raises:
        `ValueError`: names the first row that does not have exactly one image.
    """
    row_of_image: dict[str, int] = {}
    for number, row in enumerate(rows.select_columns("images").cast_column("images", List(Image(decode=False)))):
        if len(row["images"]) != 1:
            raise ValueError(f"Row {number} has {len(row['images'])} images. Caption matching needs one per row.")
        first = row_of_image.setdefault(image_key(row["images"][0]), number)
        if first != number:
            raise ValueError(
                f"Rows {first} and {number} have the same image. Caption matching needs one row per image: keep one "
                "caption of each image."
            )


def _vision_features(model, processor, images: list[dict], batch_size: int) -> list[torch.Tensor]:
    features: list[torch.Tensor] = []
    for start in range(0, len(images), batch_size):
        batch = prepare_images(images[start : start + batch_size], processor.image_processor)
        pixel_values = processor.image_processor(batch, return_tensors="pt")["pixel_values"]
        features += model.get_image_features(pixel_values.to(model.device, model.dtype)).vision_features.cpu()
    return features


def _next_rows(num_rows: int, num_others: int) -> list[list[int]]:
    return [[(row + step) % num_rows for step in range(1, num_others + 1)] for row in range(num_rows)]


def _similar_rows(rows: Dataset, num_others: int) -> list[list[int]]:
    """Return the rows whose answers have the most content words in common with each row's."""
    words = [content_words(answer_texts(row["messages"])) for row in rows]
    similar = []
    for row, row_words in enumerate(words):
        shared = [
            (-len(row_words & other_words), (number - row) % len(words)) for number, other_words in enumerate(words)
        ]
        ranked = sorted(set(range(len(words))) - {row}, key=shared.__getitem__)
        similar.append(ranked[:num_others])
    return similar


def _caption_losses(model, processor, encoded: list[tuple], vision_features: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of the supervised tokens of each row, `(num_rows,)`, in nats per token."""
    num_patches, device = vision_features.shape[1], model.device
    repeats = [torch.where(ids == processor.image_token_id, num_patches, 1) for ids, _ in encoded]
    length = max(int(number.sum()) for number in repeats)
    input_ids = torch.full((len(encoded), length), processor.tokenizer.eos_token_id)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for i, ((ids, supervised), number) in enumerate(zip(encoded, repeats, strict=True)):
        size = int(number.sum())
        input_ids[i, :size], attention_mask[i, :size] = ids.repeat_interleave(number), 1
        labels[i, :size] = torch.where(supervised, ids, -100).repeat_interleave(number)
    states = model.model(
        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), vision_features=vision_features
    ).last_hidden_state
    row, position = (labels[:, 1:] != -100).nonzero(as_tuple=True)  # position n − 1 predicts token n
    targets = labels[row, position + 1]
    logits = model.lm_head(states[row.to(states.device), position.to(states.device)])
    losses = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none").cpu().double()
    sums = torch.zeros(len(encoded), dtype=torch.float64).index_add_(0, row, losses)
    return sums / torch.bincount(row, minlength=len(encoded))
