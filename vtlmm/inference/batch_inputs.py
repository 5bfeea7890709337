# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Build the arguments of `model.generate` for a batch of prompts. The vision tower runs once for each image."""

from collections import OrderedDict
from collections.abc import Callable, MutableMapping

import torch

from vtlmm.data.encoding import position_limit
from vtlmm.data.images import MAX_IMAGE_PIXELS, ImageSource, limit_aspect_ratio, open_image

from .prompt_encoding import Prompt, encode_prompt


IMAGES_IN_MEMORY = 1024


class VisionFeatures(OrderedDict):
    """
    Vision tower outputs by image key, each of shape `(num_patches, vision_feature_size)`, on the CPU.

    For an exported LLaVA, the values are the projected image features, `(num_patches, hidden_size)`. Holds the
    `max_images` images that were used last.
    """

    def __init__(self, max_images: int = IMAGES_IN_MEMORY):
        super().__init__()
        self.max_images = max_images

    def __getitem__(self, key: str) -> torch.Tensor:
        self.move_to_end(key)
        return super().__getitem__(key)

    def __setitem__(self, key: str, features: torch.Tensor) -> None:
        super().__setitem__(key, features)
        while len(self) > self.max_images:
            self.popitem(last=False)


@torch.inference_mode()
def model_inputs(
    model,
    processor,
    prompts: list[Prompt],
    load_image: Callable,
    vision_features: MutableMapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    r"""
    Return the arguments of `model.generate` for a batch of prompts, padded on the left.

    Returns:
        `dict` with `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)` and, if there are images,
            `inputs_embeds` of shape `(batch_size, sequence_length, hidden_size)` with the image features in them.
    """
    token_ids = [encode_prompt(processor, prompt.messages) for prompt in prompts]
    image_keys = [prompt.images for prompt in prompts]
    return encoded_inputs(model, processor, token_ids, image_keys, load_image, vision_features)


@torch.inference_mode()
def encoded_inputs(
    model,
    processor,
    token_ids: list[list[int]],
    image_keys: list[list[str]],
    load_image: Callable,
    vision_features: MutableMapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    r"""
    As [`model_inputs`], for prompts that are already encoded.

    Args:
        token_ids (`list[list[int]]`): prompts from [`encode_prompt`], with one image token for each image.
        image_keys (`list[list[str]]`): image keys of each prompt, in the order of its image tokens.
    """
    images = [key for keys in image_keys for key in keys]
    decoder_inputs = image_inputs(model, processor, images, load_image, vision_features)
    rows = []
    for tokens, keys in zip(token_ids, image_keys, strict=True):
        row: list[int] = []
        remaining = iter(keys)
        if tokens.count(processor.image_token_id) != len(keys):
            number = tokens.count(processor.image_token_id)
            raise ValueError(f"The chat template writes {number} image tokens for {len(keys)} images.")
        for token in tokens:
            is_image = token == processor.image_token_id
            row += [token] * (len(decoder_inputs[next(remaining)]) if is_image else 1)
        rows.append(row)
    inputs = padded_on_left(processor, rows, model.device)
    if images:
        input_ids = inputs["input_ids"]
        mask = (input_ids == processor.image_token_id) & (inputs["attention_mask"] == 1)
        # The image token may be outside the embedding matrix. Its rows are replaced anyway.
        embeddings = model.get_input_embeddings()(input_ids.masked_fill(mask, 0))
        features = torch.cat([decoder_inputs[key] for key in images]).to(embeddings.device, embeddings.dtype)
        inputs["inputs_embeds"] = embeddings.masked_scatter(mask.unsqueeze(-1), features)
    return inputs


def padded_on_left(processor, rows: list[list[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` of token ids, padded on the left to `(batch_size, sequence_length)`."""
    length = max(map(len, rows))
    padding = [length - len(row) for row in rows]
    tokenizer = processor.tokenizer
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = [[pad_token_id] * number + row for number, row in zip(padding, rows, strict=True)]
    masks = [[0] * number + [1] * (length - number) for number in padding]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(masks, device=device),
    }


def image_pixels(processor, source: ImageSource, max_pixels: int = MAX_IMAGE_PIXELS) -> torch.Tensor:
    """Return the `pixel_values` of one image, `(3, height, width)`. For the arguments, see [`open_image`]."""
    image = limit_aspect_ratio(open_image(source, max_pixels), processor.image_processor)
    return processor.image_processor([image], return_tensors="pt")["pixel_values"][0]


def image_inputs(model, processor, keys: list[str], load_image: Callable, vision_features) -> dict[str, torch.Tensor]:
    """
    Return what the decoder reads for each image, `(num_patches, hidden_size)`, by image key.

    `load_image` returns an image as [`open_image`] takes it, or the result of [`image_pixels`].
    """
    distinct = list(dict.fromkeys(keys))
    has_vm_head = model.config.model_type == "vtlmm"  # an exported LLaVA takes no vision features
    cached = {key: vision_features[key] for key in distinct if key in vision_features}
    new = [key for key in distinct if key not in cached]
    image_features: dict[str, torch.Tensor] = {}
    if cached and has_vm_head:
        features = torch.stack(list(cached.values())).to(model.device, model.dtype)
        encoded = model.model.get_image_features(vision_features=features)
        image_features.update(zip(cached, encoded.pooler_output, strict=True))
    elif cached:
        image_features.update({key: features.to(model.device, model.dtype) for key, features in cached.items()})
    if new:
        loaded = [load_image(key) for key in new]
        pixels = [image if isinstance(image, torch.Tensor) else image_pixels(processor, image) for image in loaded]
        encoded = model.get_image_features(pixel_values=torch.stack(pixels).to(model.device))
        image_features.update(zip(new, encoded.pooler_output, strict=True))
        for key, features in zip(new, encoded.vision_features if has_vm_head else encoded.pooler_output, strict=True):
            vision_features[key] = features.cpu()
    return image_features


def limit_new_tokens(model, prompt_length: int, max_new_tokens: int) -> int:
    """
    Return how many tokens the decoder can generate after the prompt, at most `max_new_tokens`.

    Raises:
        `ValueError`: if the prompt fills the decoder's positions.
    """
    limit = position_limit(model.config)
    if limit is None or max_new_tokens < 1:
        return max_new_tokens
    if prompt_length >= limit:
        raise ValueError(
            f"The question has {prompt_length} tokens with its images, but the decoder has {limit} positions. Shorten "
            "the question or give fewer images."
        )
    return min(max_new_tokens, limit - prompt_length)
