# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Chat templates for llama.cpp (Jinja) and Ollama (Go), made from the model's own template."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from .gguf_tokenizer import GGUFTokenizer


GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
UNICODE_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")
# Texts that no template contains, to find the turns in a rendered conversation.
SYSTEM, QUESTION, ANSWER, FOLLOW_UP = (f"\ufdd2{letter}\ufdd3" for letter in "SQAF")


def llama_cpp_template(template: str, image_token: str, leading_space: bool) -> str:
    r"""
    Return a chat template for llama.cpp that prints the same prompts.

    The marks of answers, which llama.cpp does not need, become conditions that are always true. It cannot parse `+%}`
    and `{%+`, which become empty texts that keep white space in the same way, nor `\uXXXX`, which becomes the
    character. The markers that it writes for images become the `image` parts that `template` reads.

    Args:
        template (`str`): the model's template.
        image_token (`str`): what it prints for an image.
        leading_space (`bool`): start each prompt with a space, unless a special token does.
    """
    plain = GENERATION.sub(lambda match: f"{match[1]}{'endif' if match[2] else 'if true'}{match[3]}", template)
    text = Path(__file__).with_name("llama_cpp_images.jinja").read_text(encoding="utf-8").removesuffix("\n")
    start = '("" if prompt.startswith(bos_token or " ") or prompt.startswith(" ") else " ")' if leading_space else '""'
    text = text.replace("START", start).replace("IMAGE_TOKEN", image_token)
    # Jinja drops one newline at the end of a template, and here the template is no longer at the end.
    text = text.replace("MODEL_TEMPLATE", plain.removesuffix("\n"))
    text = text.replace("+%}", '%}{{ "" }}').replace("{%+", '{{ "" }}{%')
    return UNICODE_ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)


def ollama_modelfile(
    model: str, projector: str, processor: Any, tokenizer: GGUFTokenizer, stops: Sequence[str]
) -> str:
    """
    Return the text of an Ollama Modelfile for the two GGUF files.

    Args:
        model, projector (`str`): names of the files.
        processor ([`VTLMMProcessor`]), tokenizer ([`GGUFTokenizer`])
        stops (`list[str]`): texts of the tokens that end an answer.
    """
    lines = [
        "# ollama create NAME -f Modelfile",
        "# Ollama puts an image directly before the text. As in training, start with [img] and a line break.",
        f"FROM ./{model}",
        f"FROM ./{projector}",
    ]
    template = go_template(processor, tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += ["PARAMETER temperature 0", *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops)]
    return "\n".join(lines) + "\n"


def go_template(processor: Any, tokenizer: GGUFTokenizer) -> str | None:
    """
    Return the chat template of `processor` as a Go template, or None if its turns have no fixed texts between them.

    A BOS that the tokenizer adds is left out, because Ollama adds it too.
    """

    def render(*messages: str) -> str:
        roles = {SYSTEM: "system", ANSWER: "assistant"}
        conversation = [
            {"role": roles.get(text, "user"), "content": [{"type": "text", "text": text}]} for text in messages
        ]
        text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        return text.removeprefix(processor.tokenizer.bos_token) if tokenizer.add_bos else text

    try:
        start, open_prompt = _between(render(QUESTION), QUESTION)
        pieces = _between(render(QUESTION, ANSWER, FOLLOW_UP), QUESTION, ANSWER, FOLLOW_UP)
        if (pieces[0], pieces[3]) != (start, open_prompt) or '"""' in "".join(pieces):
            return None
    except (TemplateError, ValueError):
        return None
    try:
        before_system, after_system, last = _between(render(SYSTEM, QUESTION), SYSTEM, QUESTION)
        with_system = (before_system, after_system) if last == open_prompt else ("", start)
    except (TemplateError, ValueError):
        with_system = ("", start)  # the template accepts no system message
    if tokenizer.leading_space:
        start, with_system = _with_space(start), (_with_space(with_system[0]), with_system[1])
    texts = [json.dumps(text, ensure_ascii=False) for text in (start, *with_system, pieces[1], pieces[2], open_prompt)]
    return GO_TEMPLATE % tuple(texts)


# The variable holds the text between the last message and the next question.
GO_TEMPLATE = (
    "{{- $next := %s }}{{- range .Messages }}"
    '{{- if eq .Role "system" }}{{ %s }}{{ .Content }}{{ $next = %s }}'
    '{{- else if eq .Role "user" }}{{ $next }}{{ .Content }}'
    '{{- else if eq .Role "assistant" }}{{ %s }}{{ .Content }}{{ $next = %s }}'
    "{{- end }}{{- end }}{{ %s }}"
)


def _with_space(text: str) -> str:
    return text if text.startswith(" ") else f" {text}"


def _between(text: str, *marks: str) -> list[str]:
    """Return the texts before, between and after `marks`. Raises `ValueError` if they do not occur once, in order."""
    pieces = []
    for mark in marks:
        before, separator, text = text.partition(mark)
        if not separator or mark in text:
            raise ValueError(mark)
        pieces.append(before)
    return [*pieces, text]
