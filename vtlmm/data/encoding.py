# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Encode a conversation: apply the chat template, tokenize it, and mark the supervised tokens."""

import re

import torch
from transformers.utils.chat_template_utils import render_jinja_template


def answer_template(processor) -> str:
    """
    The chat template of `processor`, which must mark the answers: they are what is supervised.

    Raises:
        `ValueError`: for a template without generation marks, or a tokenizer that does not give offsets.
    """
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template or not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise ValueError(
            "The processor's chat template does not mark the answers, so nothing says what is supervised: put {% "
            "generation %} … {% endgeneration %} around an answer and its end-of-turn token in chat_template.jinja, "
            "or make the model with `vtlmm compose --chat-template vicuna_v1` (or mistral)."
        )
    if not processor.tokenizer.is_fast:
        raise ValueError("The answers are found by character offsets: load a fast tokenizer (tokenizer.json).")
    return template


def require_end_of_turn(processor) -> None:
    """
    Trained on answers without an end, a model never stops.

    Raises:
        `ValueError`: when no special token ends a marked answer, and as [`answer_template`].
    """
    answer_template(processor)
    texts = {"user": "question", "assistant": "answer"}
    probe = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
    try:
        input_ids, supervised = encode_messages(processor, probe)
    except ValueError:
        return  # a template may want other conversations than this one; the rows will tell
    tokens = processor.tokenizer.added_tokens_decoder
    special = {*processor.tokenizer.all_special_ids, *(i for i, token in tokens.items() if token.special)}
    special -= {processor.tokenizer.unk_token_id}  # the probe's words, to a tokenizer that does not know them
    if not special & set(input_ids[supervised].tolist()):
        raise ValueError(
            "The processor's chat template marks answers that have no end-of-turn token, so a model trained on them "
            "never stops: put {{ eos_token }} before {% endgeneration %} in chat_template.jinja, or make the model "
            "with `vtlmm convert` or `vtlmm compose` and `--chat-template vicuna_v1` (or mistral)."
        )


def encode_messages(processor, messages: list[dict], num_context_messages: int = 0):
    r"""
    Token ids of one conversation, and which of them are supervised.

    Every image is ONE image token here. To repeat it gives the same ids as to repeat its text before tokenizing,
    since it is a token by itself, and costs no time.

    Args:
        processor ([`VTLMMProcessor`])
        messages (`list[dict]`): `role` and `content`, a string or a list of `{"type", "text"}`. Is not changed.
        num_context_messages (`int`, *optional*, defaults to 0): answers among the first so many are not supervised.

    Returns:
        `tuple[torch.LongTensor, torch.BoolTensor]`, both of shape `(sequence_length,)`.

    Raises:
        `ValueError`: when the template refuses the conversation, leaves an answer unmarked, or BOS stands twice.
    """
    tokenizer, template = processor.tokenizer, answer_template(processor)
    # A loaded dataset fills the keys that a part does not have with None, and templates ask for the keys
    messages = [{**m, "content": _without_empty_keys(m["content"])} for m in messages]
    try:
        texts, spans = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the chat template refuses it: {error}") from error
    text, spans = texts[0], spans[0]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) != len(answers):
        raise ValueError(f"the chat template marks {len(spans)} answers where there are {len(answers)}")
    # As the processor does it for generation: a template may write BOS itself
    bos = tokenizer.bos_token
    encoding = tokenizer(
        text, add_special_tokens=not (bos and text.startswith(bos)), return_offsets_mapping=True, verbose=False
    )
    input_ids = torch.tensor(encoding["input_ids"])
    if bos and bos != tokenizer.eos_token and (input_ids == tokenizer.bos_token_id).sum() > 1:
        raise ValueError(f"{bos!r} stands in it more than once: it is in a text, or inside the chat template")
    token_starts, token_ends = torch.tensor(encoding["offset_mapping"]).unbind(-1)
    supervised = torch.zeros_like(input_ids, dtype=torch.bool)
    for index, (start, end) in zip(answers, spans, strict=True):
        if index >= num_context_messages:
            # A token may have a space before the mark or behind it; one that ends after that is of the next turn
            stop = len(text) - len(text[end:].lstrip())
            supervised |= (token_starts < end) & (token_ends > start) & (token_ends <= stop)
    return input_ids, supervised & (input_ids != processor.image_token_id)


def _without_empty_keys(content):
    if isinstance(content, str):
        return content
    return [{key: value for key, value in part.items() if value is not None} for part in content]


def describe_row(row: dict) -> str:
    """How an error names a row that has lost its index: by its first words and its images' files."""
    texts = [m["content"] if isinstance(m["content"], str) else _first_text(m["content"]) for m in row["messages"]]
    words = next((text for text in texts if text), "")
    # A image that is not decoded yet is a dict; one from bytes has no file
    files = [i.get("path") if isinstance(i, dict) else getattr(i, "filename", None) for i in row["images"]]
    files = ", ".join(file for file in files if file)
    return f"the row that begins {words[:60]!r}" + (f" (image {files})" if files else "")


def _first_text(parts: list[dict]) -> str | None:
    return next((part["text"] for part in parts if part.get("text")), None)
