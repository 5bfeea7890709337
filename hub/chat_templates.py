# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Chat templates: the two of the release, and any decoder's template with images and generation marks.

A template is Jinja text. All templates here accept messages with string content or a list of parts
(`{"type": "image"}`, `{"type": "text", "text": …}`). `{% generation %}` marks enclose each answer and its end-of-turn
token, so that the supervised tokens are known without a search in the text.
"""

import re
import warnings
from pathlib import Path
from typing import Any

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
    Return the template `"vicuna_v1"` or `"mistral"` of the release, or the content of a `.jinja` file.

    Raises:
        `ValueError`: for any other name.
    """
    if name in TEMPLATE_NAMES:
        return _read(name)
    if not name.endswith(".jinja"):
        raise ValueError(f"`chat_template` is {name!r}; it must be {' or '.join(TEMPLATE_NAMES)}, or a .jinja file.")
    return Path(name).read_text(encoding="utf-8")


def add_images_and_marks(template: str, tokenizer: Any) -> str:
    r"""
    Return a decoder's chat template with the image block, and with generation marks if it has none.

    Args:
        template (`str`): the decoder's template, for messages with string content.
        tokenizer ([`PreTrainedTokenizerBase`]): the decoder's. Its special tokens show where a turn ends.

    Returns:
        `str`: a template that prints conversations without images as before. If the answers cannot be marked, a
            warning is given and the template has the image block only.
    """
    image_block = _read("image_block")
    if has_marks(template):
        return image_block + template
    end = end_of_turn(template, tokenizer)
    reason: str | None = "no special token follows an answer"
    if end is not None:
        # Jinja drops one newline at the end of a template, and here the template is no longer at the end.
        marks = _read("answer_marks").replace("END_OF_TURN", _quote(end))
        marked = image_block + marks.replace("DECODER_TEMPLATE", template.removesuffix("\n"))
        reason = _difference(template, marked, end, tokenizer)
        if reason is None:
            return marked
    warnings.warn(
        f"Generation marks cannot be added to the decoder's chat template: {reason}. The template can be used for "
        "generation. For training, pass `chat_template`: a file with {% generation %} marks, or "
        f"{' or '.join(TEMPLATE_NAMES)}."
    )
    return image_block + template


def default_system_prompt(template: str, tokenizer: Any) -> str:
    """
    Return the text that `template` puts before the first user turn of a conversation without a system message.

    The BOS token is not part of it. The text is empty if the template adds none, or if it cannot be found.
    """
    try:
        first, two_turns, three_turns = (_render(template, PROBE_MESSAGES[:n], tokenizer)[0] for n in (1, 2, 3))
    except TemplateError:
        return ""
    turn = three_turns.removeprefix(two_turns).replace(PROBE_MESSAGES[2]["content"], PROBE_MESSAGES[0]["content"])
    if not three_turns.startswith(two_turns) or not turn or not first.endswith(turn):
        return ""
    prompt, bos = first.removesuffix(turn), tokenizer.bos_token
    if bos and prompt.startswith(bos) and not turn.startswith(bos):
        prompt = prompt.removeprefix(bos)
    return prompt if prompt.strip() else ""


def drop_default_system_prompt(template: str, tokenizer: Any) -> str:
    """
    Return [`add_images_and_marks`] of `template` without its default system prompt.

    Raises:
        `ValueError`: if the template has generation marks already, which cannot be rendered into a variable.
    """
    if has_marks(template):
        raise ValueError(
            "The default system prompt cannot be removed from a chat template with generation marks. Edit the "
            "template and pass it as a .jinja file (`chat_template`)."
        )
    prompt = default_system_prompt(template, tokenizer)
    if not prompt:
        return add_images_and_marks(template, tokenizer)
    without = _read("drop_system_prompt").replace("SYSTEM_PROMPT", _quote(prompt))
    return add_images_and_marks(without.replace("DECODER_TEMPLATE", template.removesuffix("\n")), tokenizer)


def has_marks(template: str) -> bool:
    """Return whether `template` has generation marks."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def end_of_turn(template: str, tokenizer: Any) -> str | None:
    """Return the special token that `template` prints after an answer, or None if it prints other text there."""
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in PROBE_MESSAGES]
    try:
        text = _render(template, PROBE_MESSAGES, tokenizer)[0]
        if PROBE_MESSAGES[1]["content"] not in text:  # a template for messages with images
            text = _render(template, parts, tokenizer)[0]
    except TemplateError:
        return None
    _, answer, rest = text.partition(PROBE_MESSAGES[1]["content"])
    if not answer:
        return None
    rest = rest.lstrip()
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special.update(tokenizer.all_special_tokens)
    return max((token for token in special if rest.startswith(token)), key=len, default=None)


def _read(name: str) -> str:
    return Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def _quote(text: str) -> str:
    """Return `text` as a Jinja string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _render(
    template: str, messages: list[dict[str, Any]], tokenizer: Any, add_generation_prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of `messages` and the (start, end) of each marked answer in it."""
    rendered: Any = render_jinja_template(
        [messages],
        chat_template=template,
        return_assistant_tokens_mask=has_marks(template),
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    texts, spans = rendered
    return texts[0], spans[0] if spans else []


def _difference(template: str, marked: str, end: str, tokenizer: Any) -> str | None:
    """Return how `marked` differs from `template` with marks around each answer and `end`, or None if it does not."""
    system = [{"role": "system", "content": "System text"}]
    for messages in (PROBE_MESSAGES[:1], PROBE_MESSAGES[:2], PROBE_MESSAGES, system + PROBE_MESSAGES):
        prompt = messages[-1]["role"] == "user"
        try:
            expected = _render(template, messages, tokenizer, prompt)[0]
        except TemplateError:
            continue  # many templates reject a system message
        try:
            text, spans = _render(marked, messages, tokenizer, prompt)
        except TemplateError as error:
            return f"with marks it raises an error ({error})"
        if text != expected:
            return "with marks it prints another text"
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        marked_texts = [text[start:stop] for start, stop in spans]
        if len(marked_texts) != len(answers) or not all(
            span.startswith(answer) and span.endswith(end) for span, answer in zip(marked_texts, answers, strict=True)
        ):
            return "the marks do not enclose the answers"
    return None
