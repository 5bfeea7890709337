# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Choose the next token of each row of a batch. A row's choice does not depend on the other rows."""

import random
from collections import Counter
from dataclasses import dataclass

import torch


# A lower temperature divides by almost 0 and is the same as greedy decoding
MIN_TEMPERATURE = 1e-4


@dataclass(frozen=True)
class Sampling:
    r"""
    How tokens are chosen. The names and values are those of OpenAI's API.

    Attributes:
        temperature (`float`): 0 is greedy decoding.
        top_p (`float`): sample from the most likely tokens whose probabilities add up to `top_p`.
        seed (`int`, *optional*): the same seed gives the same answer.
        frequency_penalty (`float`): subtracted from a token's logit for each time that the answer has the token.
        presence_penalty (`float`): subtracted once from the logits of all tokens that the answer has.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0


class RowSampler:
    """
    The random numbers and the token counts of one answer.

    Args:
        settings ([`Sampling`])
        index (`int`): number of the answer. The answers of one request with a seed differ.
    """

    def __init__(self, settings: Sampling, index: int = 0):
        self.settings = settings
        self.is_greedy = settings.temperature < MIN_TEMPERATURE
        self.has_penalty = bool(settings.frequency_penalty or settings.presence_penalty)
        self.random = random.Random(None if settings.seed is None else f"{settings.seed}/{index}")
        self.counts: Counter[int] = Counter()


def choose_tokens(scores: torch.Tensor, samplers: list[RowSampler]) -> list[int]:
    r"""
    Return one token id for each row.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, vocab_size)`): logits in float32. Changed in place.
        samplers (`list[RowSampler]`): one for each row.
    """
    for scores_of_row, sampler in zip(scores, samplers, strict=True):
        if sampler.has_penalty and sampler.counts:
            ids = torch.tensor(list(sampler.counts), device=scores.device)
            counts = torch.tensor(list(sampler.counts.values()), device=scores.device, dtype=scores.dtype)
            settings = sampler.settings
            scores_of_row[ids] -= settings.frequency_penalty * counts + settings.presence_penalty
    tokens = scores.argmax(-1).tolist()
    sampled = [i for i, sampler in enumerate(samplers) if not sampler.is_greedy]
    if sampled:
        drawn = _sample(scores[sampled], [samplers[i] for i in sampled])
        for i, token in zip(sampled, drawn, strict=True):
            tokens[i] = token
    for token, sampler in zip(tokens, samplers, strict=True):
        if sampler.has_penalty:
            sampler.counts[token] += 1
    return tokens


def _sample(scores: torch.Tensor, samplers: list[RowSampler]) -> list[int]:
    """Draw a token of each row: the first whose cumulative probability exceeds a random number of the row."""
    if scores.device.type == "mps":  # MPS has no float64
        scores = scores.cpu()
    device = scores.device
    temperature = torch.tensor([[sampler.settings.temperature] for sampler in samplers], device=device)
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    # float64, because the rounding errors of a sum over the vocabulary in float32 would change rare tokens
    probabilities = scores.softmax(-1).double()
    nuclei = [i for i, sampler in enumerate(samplers) if sampler.settings.top_p < 1]
    if nuclei:
        top_p = torch.tensor([[samplers[i].settings.top_p] for i in nuclei], device=device, dtype=torch.float64)
        values, order = probabilities[nuclei].sort(-1, descending=True)
        outside = values.cumsum(-1) - values >= top_p
        outside[:, 0] = False  # the most likely token stays with top_p=0
        probabilities[nuclei] = torch.zeros_like(values).scatter(-1, order, values.masked_fill(outside, 0.0))
    cumulative = probabilities.cumsum(-1)
    drawn = torch.tensor([[sampler.random.random()] for sampler in samplers], device=device, dtype=torch.float64)
    index = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)
    return index.clamp(max=scores.shape[-1] - 1)[:, 0].tolist()


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability in nats, and the most likely tokens of its position with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def token_logprobs(logits: torch.Tensor, tokens: list[int], numbers: list[int | None]) -> list[TokenLogprob | None]:
    r"""
    Return the log probabilities of the chosen tokens under the model, before penalties and temperature.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, vocab_size)`)
        tokens (`list[int]`): the chosen token of each row.
        numbers (`list[int | None]`): how many of the most likely tokens to return for each row; `None` for a row
            without log probabilities.
    """
    row_logprobs: list[TokenLogprob | None] = [None] * len(tokens)
    rows = [i for i, number in enumerate(numbers) if number is not None]
    if rows:
        logprobs = logits[rows].float().log_softmax(-1)
        values, ids = logprobs.topk(min(max(numbers[i] or 0 for i in rows), logprobs.shape[-1]))
        for i, row, top_values, top_ids in zip(rows, logprobs, values.tolist(), ids.tolist(), strict=True):
            top = list(zip(top_ids, top_values, strict=True))[: numbers[i]]
            row_logprobs[i] = TokenLogprob(tokens[i], row[tokens[i]].item(), top)
    return row_logprobs
