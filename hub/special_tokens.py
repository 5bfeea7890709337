# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Room for the image token and for padding: in a tokenizer, in the embeddings, and never in what is generated."""

import logging
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from .chat_templates import end_of_turn


logger = logging.getLogger(__name__)

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"


@dataclass
class Vocabulary:
    """
    num_words (`int`): words that visual tokens are distributions over: the tokenizer's, before anything was added.
    image_token_id (`int`)
    new_ids (`list[int]`): ids of the tokens that were added, the image token's among them.
    """

    num_words: int
    image_token_id: int
    new_ids: list[int]


def add_special_tokens(tokenizer, num_rows: int) -> Vocabulary:
    r"""
    Give `tokenizer` the image token, and a padding token when it has none; padding goes left, as generation needs it.

    The padding token is an existing one; else the unknown token, as in the release, unless it begins or ends texts
    too; else a new one. It never becomes the end-of-text token: whoever masks padding by its id would mask the end of
    each answer.

    Args:
        num_rows (`int`): rows of the decoder's embedding matrix.

    Raises:
        `ValueError`: when the tokenizer has more words than the decoder has embeddings.
    """
    num_words = len(tokenizer)
    if num_words > num_rows:
        raise ValueError(
            f"The tokenizer has {num_words} words but the decoder only {num_rows} embeddings: take the decoder's own."
        )
    if tokenizer.pad_token is None:
        unusable = (None, tokenizer.eos_token, tokenizer.bos_token)
        pad_token = PAD_TOKEN if tokenizer.unk_token in unusable else tokenizer.unk_token
        tokenizer.add_special_tokens({"pad_token": pad_token})
        logger.info("Padding token: %s (the tokenizer has none).", pad_token)
    elif tokenizer.pad_token == tokenizer.eos_token:
        logger.info("Padding token: %s, which also ends texts: mask padding by attention only.", tokenizer.pad_token)
    pad_left(tokenizer)
    # Last, so that it comes after every token that needs a row: it needs none itself.
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    added = {image_token_id, tokenizer.pad_token_id}
    return Vocabulary(num_words, image_token_id, sorted(i for i in added if i >= num_words))


def pad_left(tokenizer):
    """Padding goes before the text, where generation needs it. Only what is in `init_kwargs` is saved."""
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"


def num_embeddings(vocabulary: Vocabulary, num_rows: int) -> int:
    """
    Rows that the input embeddings and `lm_head` need: the `num_rows` that they have, and one for a new padding token
    where the decoder has none to spare.

    The image token gets none, since image features take its place: a row would take its share of the probability
    from the words.
    """
    return max([num_rows - 1, *(i for i in vocabulary.new_ids if i != vocabulary.image_token_id)]) + 1


def fit_rows(weight: torch.Tensor, num_rows: int) -> torch.Tensor:
    """
    A copy of `weight` (rows, hidden_size) with `num_rows` rows: its first, or new ones behind them.

    A new row is the mean of the others. So is its logit, which therefore never is the largest, however small all
    logits are: greedy decoding stays as it was.
    """
    missing = num_rows - weight.shape[0]
    if missing <= 0:
        return weight[:num_rows].clone()
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])


@torch.no_grad()
def fit_embeddings(model, vocabulary: Vocabulary):
    """Give the input embeddings and `lm_head` of `model` the rows of [`num_embeddings`]."""
    old = model.get_input_embeddings().weight.shape[0]
    new = num_embeddings(vocabulary, old)
    if new == old:
        return
    model.resize_token_embeddings(new, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.copy_(fit_rows(module.weight[:old], new))
    logger.info("Embeddings and lm_head: %d rows, %d of them new (the mean of the others).", new, new - old)


def set_generation_config(model, tokenizer, vocabulary: Vocabulary, source: GenerationConfig):
    r"""
    Greedy decoding, as in the release, that never writes an added token and stops at every end of text: those of
    `source`, the tokenizer's, and what its chat template prints after an answer.

    Args:
        tokenizer ([`PreTrainedTokenizerBase`] or `None`): then `source` has the only ids there are.
        source ([`GenerationConfig`]): the decoder's.
    """
    stops = source.eos_token_id if isinstance(source.eos_token_id, list) else [source.eos_token_id]
    bos_token_id, pad_token_id = source.bos_token_id, source.pad_token_id
    if tokenizer is not None:
        bos_token_id, pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
        end = end_of_turn(tokenizer.chat_template, tokenizer)
        stops = [*stops, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end) if end else None]
    stops = list(dict.fromkeys(stop for stop in stops if stop is not None))
    added = {vocabulary.image_token_id, *vocabulary.new_ids}
    added = sorted(i for i in added if i < model.config.text_config.vocab_size)
    model.generation_config = GenerationConfig(
        bos_token_id=bos_token_id,
        eos_token_id=stops[0] if len(stops) == 1 else stops or None,
        pad_token_id=pad_token_id,
        suppress_tokens=added or None,
    )
    logger.info("Generation: greedy, stops at %s.", stops)
