# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Convert rows of all supported formats to rows with `messages`, `images` and `num_context_messages`."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

from .columns import apply_columns, check_unused, suggest_columns
from .image_values import read_image


FORMATS = (
    "`messages` (role, content), `conversations` (from, value), `texts` (user, assistant), `prompt` and `completion`, "
    "`questions` and `answers`, `question` and `answer`, `query` and `response`, `instruction` and `output`, or an "
    "image with `caption` or `text`; images in `images` or `image`"
)
ROLES = {"human": "user", "gpt": "assistant"}
# Chat templates need a question. Captions come without one.
CAPTION_QUESTION = "Describe the image."
IMAGE_MARK = re.compile(r"\s*<image>\s*")
SURROGATE = re.compile("[\ud800-\udfff]")
# Columns with a question, and the columns with its answer in order of preference
QUESTIONS = {
    "questions": ("answers",),
    "question": ("answer", "multiple_choice_answer", "answers"),
    "query": ("response", "label", "answer"),
    "instruction": ("output", "response"),
}
CAPTIONS = ("caption", "captions", "text")
CONVERSATIONS = ("messages", "conversations", "conversation")
# Keys of a message that change what is trained, and the values that do not
MESSAGE_KEYS: dict[str, tuple] = {
    "tool_calls": (),
    "function_call": (),
    "tool_call_id": (),
    "reasoning_content": (),
    "thinking": (),
    "weight": (1,),
    "loss": (True, 1),
    "loss_scale": (1,),
    "train": (True, 1),
    "audio": (),
    "video": (),
}


class Turns(NamedTuple):
    """Conversations of one row (more than one for several captions), and the columns that they came from."""

    conversations: list[list[dict]]
    used: set[str]
    num_context_messages: int = 0


def convert_row(
    row: Any,
    index: int,
    source: str,
    folder: str | None,
    columns: Mapping[str, Any] | None = None,
    keep_columns: tuple[str, ...] = (),
    require_answers: bool = True,
) -> list[dict]:
    r"""
    Return a row of any supported format as rows with `messages`, `images` and `num_context_messages`.

    A row with several captions becomes one row per caption. Other rows become one row. Invalid values in a supported
    format, such as a number in place of a text, are passed through. `check_rows` reports them.

    Args:
        row (`dict`), index (`int`), source (`str`): the row, its index, and the file or dataset that errors name.
        folder (`str`, *optional*): absolute folder that relative image paths start from.
        columns (`dict`, *optional*): see [`load_rows`].
        keep_columns: columns to keep, as JSON texts.
        require_answers (`bool`): False accepts questions without answers.

    Raises:
        `ValueError`: if the row matches no format, has a column or key that would be ignored, or an image that cannot
            be located.
    """
    where = f"{source}, row {index}"
    original: dict = dict(row) if isinstance(row, Mapping) else {}
    row = apply_columns(original, columns or {})
    values = {key: value for key, value in row.items() if not is_empty(value)}
    images, image_columns = _column_images(values, where)
    turns = _read_turns(row, values, bool(images), require_answers, where)
    if turns is None:  # an empty question or conversation is invalid, but its format is known
        present = {key: value for key, value in row.items() if value is not None}
        turns = _read_turns(row, present, bool(images), require_answers, where)
    if turns is None:
        raise ValueError(
            f"{where} has columns {sorted(values)}, which match no supported format. Supported: {FORMATS}."
            + suggest_columns(values)
        )
    parts = [part for message in turns.conversations[0] for part in message["content"]]
    embedded = [part.pop("image") for part in parts if "image" in part]
    if embedded and images:
        raise ValueError(f"{where} has images in its messages and in {sorted(image_columns)}. Keep one of them.")
    images = embedded or images
    check_unused(values, turns.used | image_columns, turns.conversations, images, where)
    rows = []
    for messages in turns.conversations:
        if images and not any(part["type"] == "image" for message in messages for part in message["content"]):
            first: dict = next((message for message in messages if message["role"] == "user"), {"content": []})
            first["content"] = [{"type": "image", "text": None} for _ in images] + first["content"]
        rows.append(
            {
                "messages": messages,
                "images": [read_image(image, where, folder) for image in images],
                "num_context_messages": turns.num_context_messages,
                **{name: json.dumps(original.get(name), ensure_ascii=False, default=str) for name in keep_columns},
            }
        )
    return rows


def is_empty(value: Any) -> bool:
    """Return whether a table fills a missing value with `value`: None, "", an empty list or dict, or NaN."""
    if isinstance(value, str | list | tuple | dict):
        return not value
    return value is None or (isinstance(value, float) and math.isnan(value))


# ---- Images ----


def _column_images(values: dict, where: str) -> tuple[list, set[str]]:
    """Return the images of a row, and the columns that they came from."""
    used = {name for name in ("images", "image") if name in values}
    lists = [_as_list(values[name]) for name in sorted(used)]
    if len(lists) == 2 and lists[0] != lists[1]:
        raise ValueError(f"{where} has different images in `image` and `images`. Keep one of the two columns.")
    if not used and "file_name" in values:  # metadata of a folder of images
        return [values["file_name"]], {"file_name"}
    return (lists[0] if lists else []), used


# ---- Texts ----


def _read_turns(row: dict, values: dict, has_images: bool, require_answers: bool, where: str) -> Turns | None:
    """Return the conversations of a row, or None if it matches no format."""
    turns = _read_messages(values, where) or _read_prompt(row, values, require_answers, where)
    turns = turns or _read_questions(row, values, require_answers)
    if turns is None and has_images and any(name in values for name in CAPTIONS):
        name = next(name for name in CAPTIONS if name in values)
        texts = [one for value in _as_list(values[name]) for one in _caption_texts(value)]
        return Turns([_pairs([CAPTION_QUESTION], [text]) for text in texts or [None]], {name})
    return turns and _with_system(_with_history(turns, values), values, where)


def _read_messages(values: dict, where: str) -> Turns | None:
    """`messages`, `conversations`, `conversation` or `texts`."""
    if "texts" in values:  # the_cauldron and FineVision
        pairs = [turn if isinstance(turn, dict) else {} for turn in _rows_of(values["texts"])]
        questions, answers = ([pair.get(key) for pair in pairs] for key in ("user", "assistant"))
        return Turns([_pairs(questions, answers)], {"texts"})
    name = next((name for name in CONVERSATIONS if name in values), None)
    if name is None:
        return None
    turns = _rows_of(values[name])
    try:
        context = int(values.get("num_context_messages", 0))
    except (ValueError, TypeError, OverflowError):
        number = values["num_context_messages"]
        raise ValueError(f"{where}: `num_context_messages` is {number!r}. It must be a whole number.") from None
    if turns and all(isinstance(turn, dict) and {"human", "assistant"} <= turn.keys() for turn in turns):
        messages = _pairs([turn["human"] for turn in turns], [turn["assistant"] for turn in turns])
    else:
        messages = _messages(turns, where)
    return Turns([messages], {name, "num_context_messages"}, context)


def _read_prompt(row: dict, values: dict, require_answers: bool, where: str) -> Turns | None:
    """`prompt` and `completion`, each a text or messages."""
    if "prompt" not in values or ("completion" not in row and require_answers):
        return None
    prompt, completion = values["prompt"], row.get("completion")
    context = _messages(prompt, where) if isinstance(prompt, list) else [_message("user", prompt)]
    if completion is None and not require_answers:
        return Turns([context], {"prompt"})
    answer = _messages(completion, where) if isinstance(completion, list) else [_message("assistant", completion)]
    return Turns([context + answer], {"prompt", "completion"}, len(context))


def _read_questions(row: dict, values: dict, require_answers: bool) -> Turns | None:
    """A question and an answer in two columns, see `QUESTIONS`; `instruction` has more text in `input`."""
    for column, answer_columns in QUESTIONS.items():
        if column not in values:
            continue
        questions = _as_list(values[column])
        used = {column, *answer_columns}
        if column == "instruction":
            used.add("input")
            if isinstance(values.get("input"), str) and isinstance(questions[0], str):
                questions = [f"{questions[0]}\n{values['input']}"]
        answer_column = next((name for name in answer_columns if name in values), None)
        answer_column = answer_column or next((name for name in answer_columns if name in row), None)
        if answer_column is None or (not require_answers and answer_column not in values):
            if require_answers:
                continue
            return Turns([[_message("user", question) for question in questions]], used)
        answers = _as_list(row[answer_column]) or [None]
        if column != "questions" and len(questions) == 1 and (len(answers) > 1 or isinstance(answers[0], dict)):
            answers = [most_common_answer(answers)]
        return Turns([_pairs(questions, answers)], used)
    return None


def most_common_answer(answers: list) -> Any:
    """Return the most common answer of several annotators, the first of equally common ones."""
    texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    return Counter(text if isinstance(text, str) else None for text in texts).most_common(1)[0][0]


def _caption_texts(value: Any) -> list:
    """Return the texts of a caption: a text, a dict of COCO or Karpathy's split, or a list of them."""
    if isinstance(value, dict):
        return [value.get("raw", value.get("caption"))]
    return _as_list(value)


def _with_history(turns: Turns, values: dict) -> Turns:
    """Put the earlier turns of ms-swift's and LLaMA-Factory's `history`, pairs of question and answer, first."""
    pairs = values.get("history")
    if not isinstance(pairs, list | tuple) or "messages" in turns.used:
        return turns
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        return turns  # `check_unused` reports the column
    history = _pairs([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    context = turns.num_context_messages + len(history) if turns.num_context_messages else 0
    return Turns([history + messages for messages in turns.conversations], turns.used | {"history"}, context)


def _with_system(turns: Turns, values: dict, where: str) -> Turns:
    """Put the text of a column `system` or `system_prompt` first."""
    name = next((name for name in ("system", "system_prompt") if name in values), None)
    if name is None:
        return turns
    system = _message("system", values[name])
    if any(messages and messages[0]["role"] == "system" for messages in turns.conversations):
        if turns.conversations[0][0] != system:
            raise ValueError(f"{where} has a column `{name}` and a different system message. Keep one of them.")
        return turns._replace(used=turns.used | {name})
    context = turns.num_context_messages and turns.num_context_messages + 1
    return Turns([[system, *messages] for messages in turns.conversations], turns.used | {name}, context)


# ---- Messages ----


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _rows_of(value: Any) -> list:
    """Return a list of turns from a list, its JSON text (CSV), or a dict of lists (older versions of `datasets`)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, turn, strict=False)) for turn in zip_longest(*value.values())]
    return _as_list(value)


def _pairs(questions: list, answers: list) -> list[dict]:
    turns = zip_longest(questions, answers)
    return [m for question, answer in turns for m in (_message("user", question), _message("assistant", answer))]


def _messages(turns: list, where: str) -> list[dict]:
    messages = []
    for number, turn in enumerate(turns):
        turn = turn if isinstance(turn, dict) else {}
        if not MESSAGE_KEYS.keys().isdisjoint(turn):
            for key, harmless in MESSAGE_KEYS.items():
                if not is_empty(turn.get(key)) and turn[key] not in harmless:
                    raise ValueError(f"{where}: message {number} has `{key}`, which is not supported. Remove it.")
        messages.append(_message(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))))
    return messages


def _message(role: Any, content: Any) -> dict:
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    role = _string(role)
    return {"role": ROLES.get(role or "", role), "content": [new for part in parts for new in _part(part)]}


def _part(part: Any) -> list[dict]:
    """Return parts `{"type", "text"}`. An image inside a part (OpenAI, Qwen, transformers, TRL) is kept in `image`."""
    part = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else part
    if not isinstance(part, dict):
        return _text_parts(part)
    kind = part.get("type")
    if kind is None and len(part) == 1:  # Qwen-VL: {"image": path} or {"text": text}
        kind = next(iter(part))
    if kind in ("text", "input_text"):
        return _text_parts(part.get("text"))
    if kind in ("image", "image_url", "input_image"):
        image = next((part[key] for key in ("image", "image_url", "url", "path", "base64") if part.get(key)), None)
        image = image.get("url") if isinstance(image, dict) and "url" in image else image
        return [{"type": "image", "text": None, **({} if image is None else {"image": image})}]
    return [{"type": _string(kind), "text": None}]


def _text_parts(text: Any) -> list[dict]:
    """Return a text with `<image>` marks as parts. The white space around a mark is written by the chat template."""
    text = _string(text)
    if text is None:
        return [{"type": "text", "text": None}]
    if "<image>" not in text:
        return [{"type": "text", "text": text}] if text else []
    parts: list[dict] = []
    for i, piece in enumerate(IMAGE_MARK.split(text)):
        if i:
            parts.append({"type": "image", "text": None})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _string(value: Any) -> str | None:
    """Return None if `value` is not a string or contains an unpaired surrogate, which Arrow cannot store."""
    if not isinstance(value, str) or not (value.isascii() or SURROGATE.search(value) is None):
        return None
    return value
