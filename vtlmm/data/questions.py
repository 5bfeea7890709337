# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Split conversations into questions. Training, evaluation and the demo use this one function."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypedDict

from typing_extensions import NotRequired


class Question(TypedDict):
    r"""
    One question of a row.

    row (`int`): index of the row. images (`list`): images of `before` and of the question, in their order.
    question (`str`): the text. It has an `<image>` mark for every image of the question if an image comes after a
        text. Without marks all images come first.
    answer (`str` or `None`): the ground truth. None if the row has no answer.
    before (`list[dict]`, *optional*): the system message and given turns before the question.
    """

    row: int
    images: list
    question: str
    answer: str | None
    before: NotRequired[list[dict]]


class Turn(NamedTuple):
    """A user turn and its answer. `before` has `num_context_messages` messages, images included in place."""

    before: list[dict]
    user: dict
    answer: dict | None
    num_images: int
    is_context: bool


def split_questions(rows: Iterable[dict], unanswered: bool = False) -> list[Question]:
    r"""
    Return one question for each answered user turn of `rows`.

    A question is asked without the earlier turns of its conversation. It keeps the system message, the images of the
    earlier turns (before its own text), and the messages that the row marks as context (`num_context_messages`), such
    as a `prompt` of several turns.

    Args:
        rows: rows of [`load_rows`] with `messages`, `images` and `num_context_messages`. Images may be undecoded or
            replaced with keys.
        unanswered (`bool`): also return the last user turn of a conversation that has no answer, with all earlier
            messages as `before`. The earlier turns of such a conversation are not questions.
    """
    questions = []
    for index, row in enumerate(rows):
        for turn in iterate_turns(row["messages"], row.get("num_context_messages") or 0, unanswered):
            question: Question = {
                "row": index,
                "images": row["images"][: turn.num_images],
                "question": _marked_text(turn.user["content"]),
                "answer": None if turn.answer is None else _text(turn.answer["content"]),
            }
            questions.append({**question, "before": turn.before} if turn.before else question)
    return questions


def iterate_turns(messages: list[dict], num_context_messages: int, unanswered: bool = False) -> Iterator[Turn]:
    """Yield the questions of one conversation as messages: see [`split_questions`]."""
    messages = [{"role": message["role"], "content": _parts(message["content"])} for message in messages]
    system = [message for message in messages if message["role"] == "system"]
    if unanswered and messages and messages[-1]["role"] == "user":
        yield Turn(messages[:-1], messages[-1], None, _num_images(messages), True)
        return
    for i, (user, answer) in enumerate(zip(messages, messages[1:], strict=False)):
        if (user["role"], answer["role"]) != ("user", "assistant") or i + 1 < num_context_messages:
            continue
        is_context = i < num_context_messages
        before = messages[:i] if is_context else system
        num_images = _num_images(messages[: i + 1])
        num_earlier = num_images - _num_images([*before, user])
        earlier: list[dict] = [{"type": "image", "text": None}] * num_earlier
        yield Turn(before, {**user, "content": earlier + user["content"]}, answer, num_images, is_context)


def split_row(row: dict) -> list[dict]:
    """Return one row per question of a row. A row without an answered question is returned unchanged."""
    turns = list(iterate_turns(row["messages"], row["num_context_messages"]))
    rows = [
        {
            **row,
            "messages": [*turn.before, turn.user, turn.answer],
            "images": row["images"][: turn.num_images],
            "num_context_messages": len(turn.before) + 1 if turn.is_context and len(turn.before) else 0,
        }
        for turn in turns
    ]
    return rows or [row]


def question_parts(question: str, num_images: int) -> list[dict]:
    """Return the content of a user turn: the parts of a text with `<image>` marks, or `num_images` images first."""
    if "<image>" not in question:
        return [{"type": "image"} for _ in range(num_images)] + [{"type": "text", "text": question}]
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(question.split("<image>")):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text.strip()}] if text.strip() else []
    return parts


def _parts(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _num_images(messages: list[dict]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def _text(parts: list[dict]) -> str:
    return " ".join(part["text"] for part in parts if part.get("text"))


def _marked_text(parts: list[dict]) -> str:
    kinds = [part["type"] for part in parts]
    if "image" not in kinds[kinds.index("text") :] if "text" in kinds else True:
        return _text(parts)
    return " ".join("<image>" if part["type"] == "image" else part["text"] or "" for part in parts)
