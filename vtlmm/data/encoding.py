# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Encode a conversation: apply the chat template, tokenize it, and mark the supervised tokens."""

import re
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers import TokenizersBackend
from transformers.utils.chat_template_utils import render_jinja_template


if TYPE_CHECKING:  # the data check runs without torch
    import torch


# Tokens such as <|eot_id|> and <|im_start|>, which some checkpoints add without marking them as special
CONTROL_TOKEN = re.compile(r"<\|.+\|>")


def answer_template(processor) -> str:
    """
    Return the chat template of `processor`, which must mark the answers. The marked answers are supervised.

    Raises:
        `ValueError`: if the template has no generation marks, or the tokenizer does not return character offsets.
    """
    template = _default_template(processor)
    if not template or not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise ValueError(
            "The processor's chat template does not mark the answers, so the supervised tokens are unknown. Put {% "
            "generation %} … {% endgeneration %} around an answer and its end-of-turn token in chat_template.jinja, "
            "or make the model with `vtlmm compose --chat-template vicuna_v1` (or mistral)."
        )
    if not processor.tokenizer.is_fast:
        raise ValueError("Answers are located by character offsets. Load a fast tokenizer (tokenizer.json).")
    return template


def conversation_template(processor, require_marks: bool) -> str | None:
    """Return the chat template, which must mark the answers if `require_marks`; see [`answer_template`]."""
    return answer_template(processor) if require_marks else _default_template(processor)


def _default_template(processor) -> str | None:
    template = processor.chat_template
    return template.get("default") if isinstance(template, dict) else template


def position_limit(config) -> int | None:
    """Return the number of positions of a model's decoder, None if its config does not say it."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def special_token_ids(tokenizer) -> set[int]:
    """Return the ids of all tokens that the tokenizer treats as special, without the unknown token."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added} - {tokenizer.unk_token_id}


def control_tokens(processor) -> list[str]:
    """
    Return the tokens that must not occur in the text of a message, sorted.

    These are the image token, the tokens that the tokenizer treats as special, and added tokens that the chat template
    writes or that have the form `<|…|>`. Text with such a token would start or end a turn.
    """
    tokenizer, template = processor.tokenizer, processor.chat_template or ""
    texts = {processor.image_token, *tokenizer.all_special_tokens}
    for token in tokenizer.added_tokens_decoder.values():
        text = token.content
        if token.special or CONTROL_TOKEN.fullmatch(text) or (len(text.strip()) > 2 and text in str(template)):
            texts.add(text)
    return sorted(text for text in texts if text and text.strip())


def unknown_only_as_text(tokenizer) -> str | None:
    """
    Return the unknown token if only its own text is encoded as this token, None if other texts may be.

    Byte-level BPE has a token for each byte. The unknown token of such a tokenizer is an added token.
    """
    backend, token = getattr(tokenizer, "backend_tokenizer", None), tokenizer.unk_token
    model = getattr(backend, "model", None)
    added = tokenizer.added_tokens_decoder.get(tokenizer.unk_token_id)
    is_never_unknown = type(model).__name__ == "BPE" and getattr(model, "unk_token", "") is None
    return token if is_never_unknown and added is not None and not added.normalized else None


def starts_with_bos(tokenizer, text: str) -> bool:
    """
    Return whether the chat template wrote the BOS token, so that the tokenizer must not add a second one.

    Some decoders, such as SmolLM2, have one token for BOS and for the start of each turn. Later BOS tokens of the
    chat template are kept.
    """
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def require_end_of_turn(processor) -> None:
    """
    Check that each answer ends with an end-of-turn token. Otherwise the model never learns to stop.

    Raises:
        `ValueError`: if no special token ends a marked answer, and see [`answer_template`].
    """
    answer_template(processor)
    texts = {"user": "question", "assistant": "answer"}
    probe = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
    try:
        input_ids, supervised = encode_conversation(processor, probe)
    except ValueError:
        return  # the template may need other conversations; the data check reports its errors row by row
    if not special_token_ids(processor.tokenizer) & set(input_ids[supervised].tolist()):
        raise ValueError(
            "The processor's chat template marks answers that have no end-of-turn token, so a model trained on them "
            "never stops. Put {{ eos_token }} before {% endgeneration %} in chat_template.jinja, or make the model "
            "with `vtlmm convert` or `vtlmm compose` and `--chat-template vicuna_v1` (or mistral)."
        )


def encode_messages(
    processor, messages: list[dict], num_context_messages: int = 0, require_marks: bool = True
) -> "tuple[torch.Tensor, torch.Tensor]":
    r"""
    Return the token ids of one conversation, and a mask of the supervised tokens.

    Every image is ONE image token here. Repeating the token id gives the same ids as repeating its text before
    tokenization, because the tokenizer never merges the image token with other text.

    Args:
        processor ([`VTLMMProcessor`])
        messages (`list[dict]`): `role` and `content`, a string or a list of `{"type", "text"}`. Not changed.
        num_context_messages (`int`): answers among the first `num_context_messages` messages are not supervised.
        require_marks (`bool`, *optional*, defaults to `True`): False accepts a chat template that does not mark the
            answers. Then no token is supervised.

    Returns:
        A `torch.LongTensor` and a `torch.BoolTensor` of shape `(sequence_length,)`.

    Raises:
        `ValueError`: if the template raises an error or leaves an answer unmarked, or a text contains the BOS token.
    """
    import torch

    input_ids, supervised = encode_conversation(processor, messages, num_context_messages, require_marks)
    return torch.from_numpy(input_ids), torch.from_numpy(supervised)


def encode_conversation(
    processor, messages: list[dict], num_context_messages: int = 0, require_marks: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return what [`encode_messages`] returns, as NumPy arrays."""
    [encoded] = encode_conversations(processor, [messages], [num_context_messages], require_marks)
    if isinstance(encoded, ValueError):
        raise encoded
    return encoded


def encode_conversations(
    processor, conversations: list[list[dict]], num_context_messages: list[int], require_marks: bool = True
) -> list[tuple[np.ndarray, np.ndarray] | ValueError]:
    """
    Return for each conversation what [`encode_messages`] returns, as NumPy arrays, or the error that it would raise.

    The tokenizer encodes all texts in one call.
    """
    tokenizer = processor.tokenizer
    template = conversation_template(processor, require_marks)
    results: list[Any] = []
    for messages, number in zip(conversations, num_context_messages, strict=True):
        try:
            results.append(render(tokenizer, template, messages, number, require_marks))
        except ValueError as error:
            results.append(error)
    for add_special_tokens in (True, False):
        positions = [
            i
            for i, result in enumerate(results)
            if isinstance(result, Rendered) and starts_with_bos(tokenizer, result.text) != add_special_tokens
        ]
        if not positions:
            continue
        encoding = tokenizer(
            [results[i].text for i in positions],
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=require_marks,
            return_attention_mask=False,
            verbose=False,
        )
        for number, i in enumerate(positions):
            input_ids = np.array(encoding["input_ids"][number], dtype=np.int64)
            supervised = np.zeros(len(input_ids), dtype=bool)
            if require_marks:
                supervised = _supervised(results[i], encoding["offset_mapping"][number])
                supervised &= input_ids != processor.image_token_id
            results[i] = input_ids, supervised
    return results


def encodes_in_batches(tokenizer) -> bool:
    """Return whether [`encode_batch`] and a call of the tokenizer give the same token ids."""
    kind = type(tokenizer)
    names = ("__call__", "_encode_plus")
    return isinstance(tokenizer, TokenizersBackend) and all(
        getattr(kind, name) is getattr(TokenizersBackend, name) for name in names
    )


def encode_batch(tokenizer, texts: list[str], add_special_tokens: bool, offsets: bool = False) -> list:
    """Return encodings of the `tokenizers` library. A call of the tokenizer copies each of them into lists first."""
    tokenizer("", add_special_tokens=add_special_tokens)  # sets truncation, padding and the special tokens in texts
    backend = tokenizer.backend_tokenizer
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    return encode(texts, add_special_tokens=add_special_tokens)


class TokenCounts(NamedTuple):
    """The numbers of all, supervised, image and unknown tokens of several texts, `(num_texts,)` each."""

    tokens: np.ndarray
    supervised: np.ndarray
    images: np.ndarray
    unknown: np.ndarray


def count_tokens(processor, rendered: "list[Rendered]", require_marks: bool = True) -> TokenCounts:
    """Return the counts of what [`encode_conversations`] returns for the texts. See [`encodes_in_batches`]."""
    tokenizer = processor.tokenizer
    counts = TokenCounts(*(np.zeros(len(rendered), dtype=np.int64) for _ in TokenCounts._fields))
    bos = tokenizer.bos_token  # a slow property, see `starts_with_bos`
    has_bos = np.array([bool(bos) and one.text.startswith(bos) for one in rendered], dtype=bool)
    for add_special_tokens in (True, False):
        positions = np.flatnonzero(has_bos != add_special_tokens)
        if not len(positions):
            continue
        chosen = [rendered[i] for i in positions.tolist()]
        encodings = encode_batch(tokenizer, [one.text for one in chosen], add_special_tokens, require_marks)
        lengths = np.array([len(one) for one in encodings])
        ids = np.fromiter(chain.from_iterable(one.ids for one in encodings), np.int64, lengths.sum())
        row, is_image = np.repeat(np.arange(len(chosen)), lengths), ids == processor.image_token_id
        counts.tokens[positions] = lengths
        counts.images[positions] = np.bincount(row[is_image], minlength=len(chosen))
        if tokenizer.unk_token_id is not None:
            counts.unknown[positions] = np.bincount(row[ids == tokenizer.unk_token_id], minlength=len(chosen))
        if not require_marks:
            continue
        pairs = chain.from_iterable(chain.from_iterable(one.offsets for one in encodings))
        starts, ends = np.fromiter(pairs, np.int64, 2 * len(ids)).reshape(-1, 2).T
        supervised = np.zeros(len(ids), dtype=bool)
        for number in range(max(len(one.answers) for one in chosen)):
            spans = [one.span(number) for one in chosen]
            start, end, stop = np.array(spans, dtype=np.int64).T[:, row]
            supervised |= (starts < end) & (ends > start) & (ends <= stop)
        counts.supervised[positions] = np.bincount(row[supervised & ~is_image], minlength=len(chosen))
    return counts


class Rendered(NamedTuple):
    """The text of a conversation, and the start and end in characters of each supervised answer."""

    text: str
    answers: list[tuple[int, int]]

    def span(self, number: int) -> tuple[int, int, int]:
        """Return the start and the end of an answer, and the largest end of its tokens. Zeros: no such answer."""
        if number >= len(self.answers):
            return 0, 0, 0
        start, end = self.answers[number]
        # A token may include the space before or after the mark. Later tokens are of the next turn.
        return start, end, len(self.text) - len(self.text[end:].lstrip())


def render(tokenizer, template: str | None, messages: list[dict], number: int, require_marks: bool) -> Rendered:
    """
    Apply the chat template to a conversation whose first `number` messages are context.

    Raises:
        `ValueError`: see [`encode_messages`].
    """
    # A loaded dataset fills missing keys of a part with None, and templates test whether a key exists
    messages = [{**message, "content": _without_empty_keys(message["content"])} for message in messages]
    try:
        rendered: Any = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # templates raise any type of error
        raise ValueError(f"the chat template raised an error: {error}") from error
    text, spans = rendered[0][0], rendered[1][0]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"] if require_marks else []
    if require_marks and len(spans) != len(answers):
        raise ValueError(f"the chat template marks {len(spans)} answers of {len(answers)}")
    _check_bos(tokenizer, text, messages)
    return Rendered(text, [span for index, span in zip(answers, spans, strict=False) if index >= number])


def _supervised(rendered: Rendered, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Return the mask of the supervised tokens, `(sequence_length,)`, from the characters of each token."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    supervised = np.zeros(len(offsets), dtype=bool)
    for number in range(len(rendered.answers)):
        start, end, stop = rendered.span(number)
        supervised |= (starts < end) & (ends > start) & (ends <= stop)
    return supervised


def _check_bos(tokenizer, text: str, messages: list[dict]) -> None:
    bos = tokenizer.bos_token
    if not bos or bos == tokenizer.eos_token:
        return
    contents = [message["content"] for message in messages]
    texts = [part.get("text") or "" for parts in contents if isinstance(parts, list) for part in parts]
    if any(bos in one for one in [*texts, *(content for content in contents if isinstance(content, str))]):
        raise ValueError(f"the BOS token {bos!r} occurs in the text of a message. Remove it")
    if text.startswith(bos + bos):
        raise ValueError(f"the chat template writes the BOS token {bos!r} twice. Remove one of them")


def _without_empty_keys(content):
    if isinstance(content, str):
        return content
    return [{key: value for key, value in part.items() if value is not None} for part in content]


def describe_row(row: dict) -> str:
    """Return a name for a row without an index in an error: its first words and the files of its images."""
    contents = [message["content"] for message in row["messages"]]
    texts = [content if isinstance(content, str) else _first_text(content) for content in contents]
    words = next((text for text in texts if text), "")
    # An undecoded image is a dict. An image from bytes has no file.
    files = [i.get("path") if isinstance(i, dict) else getattr(i, "filename", None) for i in row["images"]]
    names = ", ".join(file for file in files if file)
    return f"the row that begins {words[:60]!r}" + (f" (image {names})" if names else "")


def _first_text(parts: list[dict]) -> str | None:
    return next((part["text"] for part in parts if part.get("text")), None)
