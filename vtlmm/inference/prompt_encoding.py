# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Encode a conversation as the prompt of a generation. Text of the user is always data, never a control token."""

import re
from dataclasses import dataclass


# Stands for a control token in a user's text while the chat template is rendered. Private-use characters.
_MARK = re.compile("\ue000([0-9]+)\ue001")


@dataclass(frozen=True)
class Prompt:
    r"""
    A conversation that ends with a question.

    Attributes:
        messages (`list[dict]`): `role` and `content`, a string or a list of `{"type": "text", "text"}` and
            `{"type": "image"}`.
        images (`list[str]`): image keys, one for each image part, in their order.
    """

    messages: list[dict]
    images: list[str]

    @property
    def text(self) -> str:
        """The text of the last message."""
        content = self.messages[-1]["content"]
        if isinstance(content, str):
            return content
        return " ".join(part["text"].strip() for part in content if part["type"] == "text" and part["text"])


def control_tokens(processor) -> set[str]:
    """Return the texts that the tokenizer turns into special tokens, the image token included."""
    tokenizer = processor.tokenizer
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {token for token in {*added, *tokenizer.all_special_tokens, processor.image_token} if token}


def encode_prompt(processor, messages: list[dict]) -> list[int]:
    r"""
    Return the token ids of a conversation with the start of an answer. Each image is one image token.

    A control token such as `</s>` or `<image>` inside a message's text is encoded as plain characters.

    Args:
        processor ([`VTLMMProcessor`])
        messages (`list[dict]`): see [`Prompt`].

    Raises:
        `ValueError`: if the tokenizer cannot encode a control token as plain characters.
    """
    tokens, tokenizer = control_tokens(processor), processor.tokenizer
    hidden: list[str] = []
    pattern = re.compile("|".join([_MARK.pattern, *(re.escape(token) for token in sorted(tokens, key=len)[::-1])]))

    def hide(match: re.Match) -> str:
        hidden.append(match.group())
        return f"\ue000{len(hidden) - 1}\ue001"

    plain = [{**message, "content": _hide(message["content"], pattern, hide)} for message in messages]
    text = processor.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    bos = tokenizer.bos_token
    input_ids: list[int] = []
    for number, piece in enumerate(_MARK.split(text)):
        if number % 2:
            input_ids += _encode_as_data(tokenizer, hidden[int(piece)])
        elif piece or not number:
            add_special_tokens = not number and not (bos and text.startswith(bos))
            input_ids += tokenizer(piece, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return input_ids


def _hide(content, pattern: re.Pattern, hide):
    if isinstance(content, str):
        return pattern.sub(hide, content)
    parts = [{key: value for key, value in part.items() if value is not None and key != "image"} for part in content]
    return [{**part, "text": pattern.sub(hide, part["text"])} if "text" in part else part for part in parts]


def _encode_as_data(tokenizer, text: str) -> list[int]:
    input_ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    if special.intersection(input_ids) - {tokenizer.unk_token_id}:
        raise ValueError(f"The text contains the control token {text!r}, which the tokenizer cannot write. Remove it.")
    return input_ids
