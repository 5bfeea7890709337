# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Chat templates: the two of the release, and any decoder's own one with images and marked answers.

A template is Jinja text. All of them here take messages whose content is a string or a list of parts
(`{"type": "image"}`, `{"type": "text", "text": …}`), and put `{% generation %}` marks around an answer and its
end-of-turn token, so that training on answers alone needs no search in the text.
"""

import re
import warnings
from pathlib import Path

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template


TEMPLATE_NAMES = ("vicuna_v1", "mistral")

PROBE_MESSAGES = [
    {"role": "user", "content": "First question"},
    {"role": "assistant", "content": "First answer"},
    {"role": "user", "content": "Second question"},
    {"role": "assistant", "content": "Second answer"},
]


def load_template(name: str) -> str:
    r"""
    The template `name` of the release, `"vicuna_v1"` or `"mistral"`, or that of a `.jinja` file.

    Raises:
        `ValueError`: for anything else.
    """
    if name in TEMPLATE_NAMES:
        return _read(name)
    if not name.endswith(".jinja"):
        raise ValueError(f"`chat_template` is {name!r}; it must be {' or '.join(TEMPLATE_NAMES)}, or a .jinja file.")
    return Path(name).read_text(encoding="utf-8")


def add_images_and_marks(template: str, tokenizer) -> str:
    r"""
    A decoder's own chat template with the image block, and with generation marks when it has none.

    Args:
        template (`str`): the decoder's template, which prints messages with string contents.
        tokenizer ([`PreTrainedTokenizerBase`]): the decoder's, whose special tokens tell where a turn ends.

    Returns:
        `str`: a template that prints conversations without images as before. Where the answers cannot be marked
        safely there is a warning, and the template has the image block only.
    """
    image_block = _read("image_block")
    if has_marks(template):
        return image_block + template
    end = end_of_turn(template, tokenizer)
    reason = "no special token follows an answer"
    if end is not None:
        quoted = '"' + end.replace("\\", "\\\\").replace('"', '\\"') + '"'
        # Jinja drops one newline at the end of a whole template, and here the text is no longer at the end.
        marks = _read("answer_marks").replace("END_OF_TURN", quoted)
        marked = image_block + marks.replace("DECODER_TEMPLATE", template.removesuffix("\n"))
        reason = _difference(template, marked, end, tokenizer)
        if reason is None:
            return marked
    warnings.warn(
        f"The decoder's chat template cannot be given generation marks: {reason}. It serves for generation; for "
        "training on answers pass `chat_template` with {% generation %} marks, or the name of one: "
        f"{', '.join(TEMPLATE_NAMES)}."
    )
    return image_block + template


def has_marks(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def end_of_turn(template: str, tokenizer) -> str | None:
    """The special token that `template` prints after an answer; None when it prints another text there."""
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in PROBE_MESSAGES]
    try:
        text = _render(template, PROBE_MESSAGES, tokenizer)[0]
        if PROBE_MESSAGES[1]["content"] not in text:  # a template for messages with images
            text = _render(template, parts, tokenizer)[0]
    except TemplateError:
        return None
    _, found, rest = text.partition(PROBE_MESSAGES[1]["content"])
    if not found:
        return None
    rest = rest.lstrip()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    return max((token for token in special if rest.startswith(token)), key=len, default=None)


def _read(name: str) -> str:
    return Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def _render(template: str, messages: list[dict], tokenizer, add_generation_prompt: bool = False):
    """The text and the (start, end) of each marked answer in it."""
    texts, spans = render_jinja_template(
        [messages],
        chat_template=template,
        return_assistant_tokens_mask=has_marks(template),
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    return texts[0], spans[0] if spans else []


def _difference(template: str, marked: str, end: str, tokenizer) -> str | None:
    """Why `marked` is not `template` with marks around answer and end of turn; None when it is."""
    system = [{"role": "system", "content": "System text"}]
    for messages in (PROBE_MESSAGES[:1], PROBE_MESSAGES[:2], PROBE_MESSAGES, system + PROBE_MESSAGES):
        prompt = messages[-1]["role"] == "user"
        try:
            expected = _render(template, messages, tokenizer, prompt)[0]
        except TemplateError:
            continue  # many templates refuse a system message
        try:
            text, spans = _render(marked, messages, tokenizer, prompt)
        except TemplateError as error:
            return f"with marks it fails ({error})"
        if text != expected:
            return "with marks it prints another text"
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        found = [text[start:stop] for start, stop in spans]
        if len(found) != len(answers) or not all(
            span.startswith(answer) and span.endswith(end) for span, answer in zip(found, answers, strict=True)
        ):
            return "the marks do not cover the answers"
    return None
