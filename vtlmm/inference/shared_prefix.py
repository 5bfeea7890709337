# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Compute the start of prompts, up to their last image, once for all questions about the same images."""

from collections import Counter
from collections.abc import Callable, MutableMapping

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .batch_inputs import encoded_inputs, padded_on_left
from .decoding_batch import DecodingBatch, pad_left, start_batch
from .prompt_encoding import Prompt, encode_prompt


class SharedPrefixes:
    """
    Builds the arguments of `model.generate` for batches in which several prompts start with the same images.

    Keeps the keys and values of one prefix, the last one of a batch, because the next batch often starts with the same
    images. Use one instance for one model with unchanged weights.

    Args:
        prompts (`list[Prompt]`): all prompts, in the order of [`answer_order`].
    """

    def __init__(self, prompts: list[Prompt]) -> None:
        self._prompts_about = Counter(tuple(prompt.images) for prompt in prompts)
        self._last: tuple | None = None
        self._batch: DecodingBatch | None = None

    @torch.inference_mode()
    def batch_inputs(
        self,
        model,
        processor,
        prompts: list[Prompt],
        load_image: Callable,
        vision_features: MutableMapping[str, torch.Tensor],
    ) -> dict:
        r"""
        As [`model_inputs`]. If enough prompts share a prefix, the arguments contain a cache with the prefixes.

        Each row is then `padding, prefix, padding, rest of the prompt`. The positions of the tokens do not change.
        """
        token_ids = [encode_prompt(processor, prompt.messages) for prompt in prompts]
        lengths = [_prefix_length(ids, processor.image_token_id) for ids in token_ids]
        rests = [ids[length:] for ids, length in zip(token_ids, lengths, strict=True)]
        prefixes = [
            (tuple(ids[:length]), tuple(prompt.images))
            for ids, length, prompt in zip(token_ids, lengths, prompts, strict=True)
        ]
        distinct = list(dict.fromkeys(prefixes))
        last, batch = self._last, self._batch
        self._last = self._batch = None  # an error must not leave a batch that is half changed
        new = [prefix for prefix in distinct if prefix != last]
        arguments = (load_image, vision_features)
        if not (self._pays(distinct) and all(lengths) and all(rests) and _can_extend_cache(model)):
            return encoded_inputs(model, processor, token_ids, [prompt.images for prompt in prompts], *arguments)
        if last not in distinct:
            batch = None
        known = new if batch is None else [last, *new]
        if new:
            ids, images = [list(ids) for ids, _ in new], [list(images) for _, images in new]
            computed = start_batch(model, encoded_inputs(model, processor, ids, images, *arguments), 1)
            if batch is None:
                batch = computed
            else:
                batch.join(computed)
        assert batch is not None
        rows = [known.index(prefix) for prefix in prefixes]
        inputs = _extended_inputs(model, processor, batch, rows, rests)
        batch.select([rows[-1]])
        self._last, self._batch = prefixes[-1], batch
        return inputs

    def _pays(self, prefixes: list[tuple]) -> bool:
        """Return whether a prefix has two prompts on average, and prompts about the same images start alike."""
        images = {images for _, images in prefixes}
        num_prompts = sum(self._prompts_about[each] for each in images)
        return len(images) == len(prefixes) and num_prompts >= 2 * len(prefixes)


def _prefix_length(token_ids: list[int], image_token_id: int) -> int:
    """Return the number of tokens up to the last image, 0 without an image."""
    return max((i + 1 for i, token in enumerate(token_ids) if token == image_token_id), default=0)


def _can_extend_cache(model) -> bool:
    """Return whether the model generates from a cache that is filled in two steps, with padding between them."""
    settings = model.generation_config
    if settings.cache_implementation is not None or settings.use_cache is False or (settings.num_beams or 1) > 1:
        return False
    # The layers of a sliding window or of a recurrent state have other types
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _extended_inputs(model, processor, batch: DecodingBatch, rows: list[int], rests: list[list[int]]) -> dict:
    """Return the arguments of `model.generate` for prompts that continue the given rows of `batch`."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for number, layer in enumerate(batch.cache.layers):
        index = torch.tensor(rows, device=layer.keys.device)
        cache.update(layer.keys[index], layer.values[index], number)
    length = batch.attention_mask.shape[1]
    prefix_ids = torch.stack([pad_left(ids, length, -1) for ids in batch.history])
    rest = padded_on_left(processor, rests, model.device)
    return {
        "input_ids": torch.cat([prefix_ids[rows], rest["input_ids"]], 1),
        "attention_mask": torch.cat([batch.attention_mask[rows], rest["attention_mask"]], 1),
        batch.cache_argument: cache,
    }
