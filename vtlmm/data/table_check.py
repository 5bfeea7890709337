# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Find the rows of a table that surely have valid messages, and encode them without a dict for each row."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .arrow_rows import python_values
from .encoding import Rendered, conversation_template, render
from .template_trace import Plan, TracedTemplate


# A text with one of these is not blank in Python either
VISIBLE = r"[!-~]|\p{L}|\p{N}"
MAX_PLANS = 32  # for conversations of one shape
MAX_FAILURES = 8  # then the template is applied to each row
MAX_MARKS = 99  # image marks before or after the text of a message


class Turn(NamedTuple):
    """The shape of a message: its role, and the number of its images before and after its text."""

    role: str
    before: int
    after: int


class PlainRow(NamedTuple):
    """The row `number` of a table. Its messages have one text each, and its images are undecoded."""

    number: int
    turns: tuple[Turn, ...]
    texts: list[str]
    images: list[dict]

    @property
    def messages(self) -> list[dict]:
        return self._messages(self.texts)

    @property
    def numbered_messages(self) -> list[dict]:
        """The messages with the numbers of their texts in place of the texts."""
        return self._messages(range(len(self.texts)))

    def _messages(self, texts: Iterable) -> list[dict]:
        image = {"type": "image"}
        return [
            {
                "role": turn.role,
                "content": [image] * turn.before + [{"type": "text", "text": text}] + [image] * turn.after,
            }
            for turn, text in zip(self.turns, texts, strict=True)
        ]

    @property
    def questions(self) -> list[str]:
        return self._texts_of("user")

    @property
    def answers(self) -> list[str]:
        return self._texts_of("assistant")

    def _texts_of(self, role: str) -> list[str]:
        return [text for turn, text in zip(self.turns, self.texts, strict=True) if turn.role == role]


def tokens_pattern(tokens: list[str]) -> str:
    """Return a regular expression of RE2 that finds any of the texts."""
    return "|".join("".join(rf"\x{{{ord(letter):x}}}" for letter in token) for token in tokens)


def plain_rows(table: pa.Table, control_pattern: str, is_image_text: Callable[[str], bool]) -> Iterator[PlainRow]:
    r"""
    Yield the rows whose messages surely have no problem. Other rows may be valid or not.

    The messages of these rows are an optional system message, then user and assistant in turn. Each has one text that
    is not blank and has no control token. The row has as many images as marks, all in questions.

    Args:
        table (`pa.Table`): with the columns of `ROW_FEATURES`, images undecoded.
        control_pattern (`str`): see [`tokens_pattern`].
        is_image_text (`Callable`): whether a text is only the path of an image.
    """
    row_ends, messages = _flat(table["messages"])
    part_ends, parts = _flat(messages.field("content")) if len(messages) else (np.zeros(1, int), None)
    if parts is None or not len(parts):
        return
    is_text = _equal(parts.field("type"), "text")
    is_mark = _equal(parts.field("type"), "image")
    starts, ends = part_ends[:-1], part_ends[1:]
    num_texts, num_marks = _sums(is_text, part_ends), _sums(is_mark, part_ends)
    is_plain = (num_texts == 1) & (num_texts + num_marks == ends - starts) & (num_marks <= MAX_MARKS)
    positions = np.flatnonzero(is_text)
    positions = np.append(positions, 0)[np.concatenate([[0], np.cumsum(num_texts)])[:-1]]
    texts = parts.field("text").take(pa.array(positions))
    is_plain &= _true(pc.match_substring_regex(texts, VISIBLE))
    is_plain &= ~_true(pc.match_substring_regex(texts, control_pattern))
    before = np.where(is_plain, positions - starts, 0)
    roles, after = python_values(messages.field("role")), num_marks - before
    turns = list(zip(roles, before.tolist(), after.tolist(), strict=True))
    image_ends, images = _flat(table["images"])
    image_values = python_values(images)
    context = table["num_context_messages"] if "num_context_messages" in table.column_names else None
    is_row = _sums(~is_plain, row_ends) == 0
    if context is not None:
        is_row &= context.fill_null(0).to_numpy() == 0
    is_row &= _sums_of(num_marks, row_ends) == np.diff(image_ends)
    message_texts, bounds, image_bounds = python_values(texts), row_ends.tolist(), image_ends.tolist()
    shapes: dict[tuple, tuple[Turn, ...] | None] = {}
    for index in np.flatnonzero(is_row).tolist():
        start, end = bounds[index], bounds[index + 1]
        shape = tuple(turns[start:end])
        if shape not in shapes:
            shapes[shape] = _valid_turns(shape)
        valid, row_texts = shapes[shape], message_texts[start:end]
        row_images = image_values[image_bounds[index] : image_bounds[index + 1]]
        if valid is None:
            continue
        row = PlainRow(index, valid, row_texts, row_images)
        if row_images or not any(map(is_image_text, row.questions)):
            yield row


def _valid_turns(shape: tuple) -> tuple[Turn, ...] | None:
    """Return the turns if their roles and images are valid."""
    turns = tuple(Turn(*turn) for turn in shape)
    first = turns[0].role if turns else None
    pairs = [turn.role for turn in (turns[1:] if first == "system" else turns)]
    is_valid = bool(pairs) and pairs == ["user", "assistant"] * (len(pairs) // 2)
    return turns if is_valid and not any(t.before + t.after for t in turns if t.role != "user") else None


class ConversationTexts:
    """
    Apply the chat template to rows of [`plain_rows`].

    Args:
        processor ([`VTLMMProcessor`]), require_marks (`bool`): see [`~encoding.encode_conversations`].
    """

    def __init__(self, processor, require_marks: bool):
        self.processor = processor
        self.tokenizer, self.require_marks = processor.tokenizer, require_marks
        self.template = conversation_template(processor, require_marks)
        self.bos = self.tokenizer.bos_token
        self.constants = dict(self.tokenizer.special_tokens_map)
        self.plans: dict[tuple[Turn, ...], list[Plan]] = {}
        self.num_failures = 0
        self.traced: TracedTemplate | None = None
        try:
            self.traced = TracedTemplate(self.template or "")
        except Exception:  # the template is invalid, or it cannot be traced; `render` applies it
            return

    def __reduce__(self):
        return ConversationTexts, (self.processor, self.require_marks)

    def render(self, row: PlainRow) -> Rendered:
        """
        Return the text of a row and its answers.

        Raises:
            `ValueError`: see [`~encoding.encode_messages`].
        """
        plan = self._plan(row) if self.traced else None
        if plan is None:
            return render(self.tokenizer, self.template, row.messages, 0, self.require_marks)
        text, spans = plan.render(row.texts)
        if self.bos and text.startswith(self.bos * 2):  # `render` raises the error
            return render(self.tokenizer, self.template, row.messages, 0, self.require_marks)
        return Rendered(text, spans if self.require_marks else [])

    def _plan(self, row: PlainRow) -> Plan | None:
        """Return a plan for the texts of a row. A new plan must give the result of the template for this row."""
        plans = self.plans.setdefault(row.turns, [])
        plan = next((plan for plan in plans if plan.fits(row.texts)), None)
        if plan is not None or len(plans) == MAX_PLANS or self.num_failures >= MAX_FAILURES:
            return plan
        expected = render(self.tokenizer, self.template, row.messages, 0, self.require_marks)
        plan = self.traced.plan(row.numbered_messages, row.texts, self.constants) if self.traced else None
        text, spans = plan.render(row.texts) if plan else ("", [])
        if plan is None or (text, spans if self.require_marks else []) != expected:
            self.num_failures += 1
            return None
        plans.append(plan)
        return plan


# ---- Columns ----


def _flat(column: pa.ListArray | pa.ChunkedArray) -> tuple[np.ndarray, Any]:
    """Return the start of each list and the end of the last in the items, and the items. A null list is empty."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    ends = array.offsets.to_numpy()
    items = array.values.slice(ends[0], ends[-1] - ends[0])
    return ends - ends[0], items


def _equal(array: pa.Array, value: str) -> np.ndarray:
    return _true(pc.equal(array, value))


def _true(array: pa.Array) -> np.ndarray:
    """Return a Boolean array; null is false."""
    return array.fill_null(False).to_numpy(zero_copy_only=False)


def _sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    return _sums_of(values.astype(np.int64), ends)


def _sums_of(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the sum of the values of each list."""
    sums = np.concatenate([[0], np.cumsum(values)])
    return sums[ends[1:]] - sums[ends[:-1]]
