# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Add image and padding tokens to tokenizer and embeddings, and suppress them in generation."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from .chat_templates import end_of_turn


logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"


@dataclass
class Vocabulary:
    """
    The sizes and new tokens of a vocabulary.

    num_words (`int`): size of the distribution of a visual token: the tokenizer's tokens before any was added.
    image_token_id (`int`)
    new_ids (`list[int]`): ids of the added tokens, the image token included.
    """

    num_words: int
    image_token_id: int
    new_ids: list[int]


def add_special_tokens(tokenizer: Any, num_rows: int) -> Vocabulary:
    r"""
    Add the image token to `tokenizer`, and a padding token if it has none. Padding goes left, as generation needs it.

    The padding token is the existing one, else the unknown token, as in the release, unless that is also the BOS or
    EOS token, else a new one. It never becomes the EOS token: code that masks padding by its id would mask the end of
    each answer.

    Args:
        num_rows (`int`): rows of the decoder's embedding matrix.

    Raises:
        `ValueError`: if the tokenizer has more tokens than the decoder has embeddings.
    """
    num_words = len(tokenizer)
    if num_words > num_rows:
        raise ValueError(
            f"The tokenizer has {num_words} tokens but the decoder only {num_rows} embeddings. Use the decoder's own "
            "tokenizer."
        )
    if tokenizer.pad_token is None:
        unusable = (None, tokenizer.eos_token, tokenizer.bos_token)
        pad_token = PAD_TOKEN if tokenizer.unk_token in unusable else tokenizer.unk_token
        tokenizer.add_special_tokens({"pad_token": pad_token})
        logger.info("Padding token: %s (the tokenizer has none).", pad_token)
    elif tokenizer.pad_token == tokenizer.eos_token:
        logger.info("Padding token: %s, which is also the EOS token. Mask padding by attention.", tokenizer.pad_token)
    pad_left(tokenizer)
    # Last, so that its id comes after all tokens that need an embedding; the image token needs none.
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    added = {image_token_id, tokenizer.pad_token_id}
    return Vocabulary(num_words, image_token_id, sorted(i for i in added if i >= num_words))


def pad_left(tokenizer: Any) -> None:
    """Set left padding, also in `init_kwargs`, which are what is saved."""
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"


def num_embeddings(vocabulary: Vocabulary, num_rows: int) -> int:
    """
    Return the number of rows that the input embeddings and `lm_head` need: `num_rows`, and one for a new padding
    token.

    The image token gets no row, since image features replace its embedding; in `lm_head` a row would take probability
    from the other tokens.
    """
    return max([num_rows - 1, *(i for i in vocabulary.new_ids if i != vocabulary.image_token_id)]) + 1


def fit_rows(weight: torch.Tensor, num_rows: int) -> torch.Tensor:
    """
    Return a copy of `weight` `(rows, hidden_size)` with `num_rows` rows: its first ones, and new ones after them.

    A new row is the mean of the others. Its logit is the mean of the other logits, so it is never the largest, and
    greedy decoding does not change.
    """
    missing = num_rows - weight.shape[0]
    if missing <= 0:
        return weight[:num_rows].clone()
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])


@torch.no_grad()
def fit_embeddings(model: Any, vocabulary: Vocabulary) -> None:
    """Resize the input embeddings and `lm_head` of `model` to [`num_embeddings`] rows."""
    old = model.get_input_embeddings().weight.shape[0]
    new = num_embeddings(vocabulary, old)
    if new == old:
        return
    model.resize_token_embeddings(new, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.copy_(fit_rows(module.weight[:old], new))
    logger.info("Embeddings and lm_head: %d rows, %d of them new (the mean of the others).", new, new - old)


def set_generation_config(model: Any, tokenizer: Any, vocabulary: Vocabulary, source: GenerationConfig) -> None:
    r"""
    Set greedy decoding, as in the release, that suppresses added tokens and stops at every end-of-text token.

    These are the end-of-text tokens of `source` and the tokenizer, and the token that its chat template writes
    after an answer.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`] or `None`): if None, the ids of `source` are used.
        source ([`GenerationConfig`]): the decoder's.
    """
    eos = source.eos_token_id
    stops: list[int | None] = list(eos) if isinstance(eos, list) else [eos]
    bos_token_id, pad_token_id = source.bos_token_id, source.pad_token_id
    if tokenizer is not None:
        bos_token_id, pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
        end = end_of_turn(tokenizer.chat_template, tokenizer)
        stops = [*stops, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end) if end else None]
    stop_ids = list(dict.fromkeys(stop for stop in stops if stop is not None))
    added = {vocabulary.image_token_id, *vocabulary.new_ids}
    suppressed = sorted(i for i in added if i < model.config.text_config.vocab_size)
    model.generation_config = GenerationConfig(
        bos_token_id=bos_token_id,
        eos_token_id=stop_ids[0] if len(stop_ids) == 1 else stop_ids or None,
        pad_token_id=pad_token_id,
        suppress_tokens=suppressed or None,
    )
    logger.info("Generation: greedy, stops at %s.", stop_ids)
