# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Collate rows into batches: chat template, image tokens, and labels on the answers only."""

import torch

from vtlmm.data.encoding import describe_row, encode_messages, require_end_of_turn
from vtlmm.data.images import prepare_images


class VTLMMCollator:
    r"""
    Collate rows of [`load_rows`] into a batch, padded on the right. Nothing is truncated.

    The supervised tokens are those between the generation marks of the chat template: answers with their end-of-turn
    token. Image tokens, BOS and padding are never supervised.

    Args:
        processor ([`VTLMMProcessor`])
        max_length (`int`, *optional*): maximum tokens of a row, image tokens included. Longer rows raise an error.
        pad_to_multiple_of (`int`, *optional*)
        feature_cache ([`VisionFeatureCache`], *optional*): gives `vision_features` of images that are not decoded.

    Returns, when called on a `list[dict]`:
        `dict`: `input_ids`, `attention_mask` and `labels` (-100 for tokens that are not supervised), each a
        `torch.LongTensor` of shape `(batch_size, sequence_length)`, and `pixel_values`, a `torch.FloatTensor` of shape
        `(num_images, 3, height, width)` in the order of the rows, if there are images. With a cache, it has
        `vision_features` of shape `(num_images, num_patches, vision_feature_size)` instead, also without images. Rows
        of a mixture give `mixture_index` of shape `(batch_size, sequence_length)`, the dataset of each token.

    Raises:
        `ValueError`: if the chat template has no generation marks or no end-of-turn token, or a row is too long, has
        no supervised token, or has another number of images than image placeholders.
    """

    def __init__(
        self, processor, max_length: int | None = None, pad_to_multiple_of: int | None = None, feature_cache=None
    ):
        require_end_of_turn(processor)
        self.processor = processor
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.feature_cache = feature_cache

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        packs = [row["rows"] for row in rows] if "rows" in rows[0] else None
        rows = [row for pack in packs for row in pack] if packs else rows
        images = [image for row in rows for image in row["images"]]
        tokens_per_image, image_inputs = 1, {}
        if self.feature_cache is not None and all(isinstance(image, dict) for image in images):
            vision_features = self.feature_cache[images]
            tokens_per_image = vision_features.shape[1]
            image_inputs = {"vision_features": vision_features}
        elif images:
            images = prepare_images(images, self.processor.image_processor)
            pixel_values = self.processor.image_processor(images, return_tensors="pt")["pixel_values"].float()
            tokens_per_image = self.processor.num_image_tokens(*pixel_values.shape[-2:])
            image_inputs = {"pixel_values": pixel_values}
        encoded = [self._encode(row, tokens_per_image) for row in rows]
        batch = self._pad(encoded) if packs is None else self._pack(encoded, [len(pack) for pack in packs])
        if "mixture_index" in rows[0]:
            indices = torch.tensor([row["mixture_index"] for row in rows])
            shape = batch["input_ids"].shape
            positions = batch["position_ids"] if packs else torch.arange(shape[1]).expand(shape)
            row_numbers = (positions == 0).flatten().cumsum(0).view(shape) - 1
            batch["mixture_index"] = indices[row_numbers]
        return {**batch, **image_inputs}

    def _encode(self, row: dict, tokens_per_image: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and labels of one row, with all image tokens, both of shape `(sequence_length,)`."""
        try:
            input_ids, supervised = encode_messages(
                self.processor, row["messages"], row.get("num_context_messages") or 0
            )
        except ValueError as error:
            raise ValueError(f"{describe_row(row)}: {error}") from error
        is_image = input_ids == self.processor.image_token_id
        if is_image.sum() != len(row["images"]):
            raise ValueError(
                f"{describe_row(row)} has {int(is_image.sum())} image placeholders and {len(row['images'])} images. "
                "Write one `<image>` for each image. `vtlmm data check` lists all such rows."
            )
        repeats = torch.where(is_image, tokens_per_image, 1)
        if self.max_length is not None and repeats.sum() > self.max_length:
            raise ValueError(
                f"{describe_row(row)} has {int(repeats.sum())} tokens, more than max_length={self.max_length} or the "
                "positions of the decoder. Rows are never truncated. Increase `max_length`, or drop such rows with "
                "`bad_rows: skip`."
            )
        if not supervised.any():
            raise ValueError(
                f"{describe_row(row)} has no supervised token: all answers are empty, or are context messages."
            )
        labels = torch.where(supervised, input_ids, -100)
        return input_ids.repeat_interleave(repeats), labels.repeat_interleave(repeats)

    def _pack(self, encoded: list[tuple[torch.Tensor, torch.Tensor]], num_rows: list[int]) -> dict[str, torch.Tensor]:
        """
        Concatenate the rows of each pack. Positions restart at 0 with each row, which separates the rows in attention.

        Padding gets position 1, never 0, so that it does not look like the start of a row. There is no attention mask.
        """
        rows = iter(encoded)
        packs = [[next(rows) for _ in range(number)] for number in num_rows]
        joined = [(torch.cat([ids for ids, _ in pack]), torch.cat([labels for _, labels in pack])) for pack in packs]
        batch = self._pad(joined)
        position_ids = torch.ones_like(batch["input_ids"])
        for i, pack in enumerate(packs):
            positions = torch.cat([torch.arange(len(input_ids)) for input_ids, _ in pack])
            position_ids[i, : len(positions)] = positions
        del batch["attention_mask"]
        return {**batch, "position_ids": position_ids}

    def _pad(self, encoded: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        # `attention_mask` marks the padding, so any token id works
        pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        length = max(len(input_ids) for input_ids, _ in encoded)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(encoded), length)
        batch = {
            "input_ids": torch.full(shape, pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, -100),
        }
        for i, (input_ids, labels) in enumerate(encoded):
            batch["input_ids"][i, : len(input_ids)] = input_ids
            batch["attention_mask"][i, : len(input_ids)] = 1
            batch["labels"][i, : len(labels)] = labels
        return batch
