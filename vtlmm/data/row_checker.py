# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Find the problems of rows and of their images, and count their tokens."""

import os

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

from .arrow_rows import python_rows, rows_table
from .encoding import (
    control_tokens,
    count_tokens,
    encode_batch,
    encode_conversations,
    encodes_in_batches,
    require_end_of_turn,
    unknown_only_as_text,
)
from .image_values import is_image_text
from .images import ImageError, open_image, processed_size
from .table_check import ConversationTexts, plain_rows, tokens_pattern
from .text_processor import TextProcessor


RESULT_FEATURES = Features(
    {
        "length": Value("int32"),
        "num_supervised_tokens": Value("int32"),
        "num_images": Value("int32"),
        "num_answers": Value("int32"),
        "unknown_answer": Value("string"),
        "num_unknown_answers": Value("int32"),
        "problems": List(
            {"kind": Value("string"), "detail": Value("string"), "image": Value("string"), "value": Value("int64")}
        ),
    }
)
# Image files whose result is kept, about 20 MB
MAX_CHECKED_FILES = 2**16


class RowChecker:
    """
    Find the problems of one row whose images are not decoded.

    Args:
        processor ([`VTLMMProcessor`])
        max_length (`int`, *optional*): longest valid row in tokens.
        images (`bool`, *optional*, defaults to `True`): decode the images.
        require_answers (`bool`, *optional*, defaults to `True`): False accepts conversations that end with a question.
        require_marks (`bool`, *optional*, defaults to `True`): False accepts a chat template that does not mark the
            answers, which only training needs.

    Raises:
        `ValueError`: if the chat template does not mark the answers or their end, or images get different sizes.
    """

    def __init__(
        self,
        processor,
        max_length: int | None = None,
        images: bool = True,
        require_answers: bool = True,
        require_marks: bool = True,
    ):
        if require_marks:
            require_end_of_turn(processor)
        self.require_marks = require_marks
        self.processor = processor
        self.max_length = max_length
        self.images = images
        self.require_answers = require_answers
        self.tokens_per_image = image_tokens_per_image(processor)
        self.control_tokens = control_tokens(processor)
        self.unknown_only_as_text = unknown_only_as_text(processor.tokenizer)
        self.control_pattern = tokens_pattern(self.control_tokens)
        self.texts = ConversationTexts(processor, require_marks)
        self.checked_files: dict[tuple, list[tuple]] = {}

    def __call__(self, row: dict) -> dict:
        """Return the values of `RESULT_FEATURES` for one row."""
        return self.check([row])[0]

    def check(self, rows: list[dict]) -> list[dict]:
        """Return the values of `RESULT_FEATURES` for several rows. Their texts are encoded in one call."""
        problems = [
            [{"kind": k, "detail": detail} for k, detail in self.message_problems(row["messages"], len(row["images"]))]
            for row in rows
        ]
        good = [i for i, row_problems in enumerate(problems) if not row_problems]
        encoded = encode_conversations(
            self.processor,
            [rows[i]["messages"] for i in good],
            [rows[i].get("num_context_messages") or 0 for i in good],
            self.require_marks,
        )
        lengths, num_supervised = [0] * len(rows), [0] * len(rows)
        for i, result in zip(good, encoded, strict=True):
            if isinstance(result, ValueError):
                problems[i].append({"kind": "chat template", "detail": str(result)})
                continue
            input_ids, supervised = result
            num_images = len(rows[i]["images"])
            num_tokens = int(np.count_nonzero(input_ids == self.processor.image_token_id))
            if num_tokens != num_images:
                detail = f"the chat template writes {num_tokens} image tokens for {num_images} images"
                problems[i].append({"kind": "chat template", "detail": detail})
            lengths[i] = len(input_ids) + num_images * (self.tokens_per_image - 1)
            num_supervised[i] = int(np.count_nonzero(supervised))
            problems[i] += self.encoding_problems(lengths[i], num_supervised[i], num_images)
        answers = [[_text(m["content"]) for m in row["messages"] if m["role"] == "assistant"] for row in rows]
        unknown = self._unknown_answers(answers)
        results = []
        for i, row in enumerate(rows):
            problems[i] += self._row_image_problems(row["images"])
            num_images = len(row["images"])
            results.append(_result(lengths[i], num_supervised[i], num_images, answers[i], unknown[i], problems[i]))
        return results

    def check_table(self, table: pa.Table) -> pa.Table:
        """Return a table of `RESULT_FEATURES` for a table of rows. Rows that are surely valid need less time."""
        results = self._check_plain(table) if encodes_in_batches(self.processor.tokenizer) else {}
        others = [i for i in range(len(table)) if i not in results]
        if others:
            rows = python_rows(table.take(pa.array(others)) if results else table)
            results |= zip(others, self.check(rows), strict=True)
        return rows_table([results[i] for i in range(len(table))], RESULT_FEATURES)

    def _check_plain(self, table: pa.Table) -> dict[int, dict]:
        """Return the results of rows whose only problems may be images, by the index of the row."""
        rows, rendered = [], []
        for row in plain_rows(table, self.control_pattern, is_image_text):
            try:
                rendered.append(self.texts.render(row))
                rows.append(row)
            except ValueError:
                continue  # `check` reports the error
        if not rows:
            return {}
        counts = count_tokens(self.processor, rendered, self.require_marks)
        answers = [row.answers for row in rows]
        # Most rows have no unknown token, so their answers are not encoded a second time.
        unknown = self._unknown_answers([row.answers if counts.unknown[i] else [] for i, row in enumerate(rows)])
        results = {}
        for i, row in enumerate(rows):
            num_images, num_supervised = len(row.images), int(counts.supervised[i])
            length = int(counts.tokens[i]) + num_images * (self.tokens_per_image - 1)
            if counts.images[i] != num_images or any(self.encoding_problems(length, num_supervised, num_images)):
                continue
            problems = self._row_image_problems(row.images)
            results[row.number] = _result(length, num_supervised, num_images, answers[i], unknown[i], problems)
        return results

    def _row_image_problems(self, images: list[dict]) -> list[dict]:
        if not self.images:
            return []
        problems = [problem for image in images for problem in self._image_problems(image)]
        return [{"kind": kind, "detail": detail, "image": path} for kind, detail, path in problems]

    def _image_problems(self, image: dict) -> list[tuple]:
        """Return the problems of an image. A file that many rows use is decoded once, unless it changes."""
        try:
            if image["bytes"] is not None:
                raise ValueError
            state = os.stat(image["path"])
        except (OSError, TypeError, ValueError):
            return list(image_problems(image))
        key = image["path"], state.st_size, state.st_mtime_ns, state.st_ctime_ns
        if key not in self.checked_files:
            if len(self.checked_files) >= MAX_CHECKED_FILES:
                self.checked_files.clear()
            self.checked_files[key] = list(image_problems(image))
        return self.checked_files[key]

    def _unknown_answers(self, answers: list[list[str]]) -> list[list[str]]:
        """Return the answers of each row that have a token which the tokenizer does not know."""
        tokenizer, token = self.processor.tokenizer, self.unknown_only_as_text
        if tokenizer.unk_token_id is None:
            return [[] for _ in answers]
        texts = list({answer for row in answers for answer in row if token is None or token in answer})
        unknown: set[str] = set()
        if texts and encodes_in_batches(tokenizer):
            encodings = encode_batch(tokenizer, texts, add_special_tokens=False)
            unknown = {text for text, one in zip(texts, encodings, strict=True) if tokenizer.unk_token_id in one.ids}
        elif texts:
            encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            ids = encoding["input_ids"]
            unknown = {text for text, row in zip(texts, ids, strict=True) if tokenizer.unk_token_id in row}
        return [[answer for answer in row if answer in unknown] for row in answers]

    def message_problems(self, messages: list[dict], num_images: int):
        """Yield the kind and the detail of each problem of the messages."""
        if not messages:
            yield "no messages", "the conversation is empty"
            return
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        pairs = ["user", "assistant"] * (len(turns) // 2 + 1)
        is_question = not self.require_answers and turns == pairs[: len(turns)]
        are_turns = bool(turns) and (is_question or (len(turns) % 2 == 0 and turns == pairs[: len(turns)]))
        if not are_turns:
            yield "roles", ", ".join(str(role) for role in roles)
        num_marks = 0
        for number, message in enumerate(messages):
            parts = message["content"]
            num_marks += sum(part["type"] == "image" for part in parts)
            if any(part["type"] not in ("text", "image") for part in parts):
                yield "text", f"message {number} has a part that is neither text nor image"
            if are_turns and message["role"] == "assistant" and any(part["type"] == "image" for part in parts):
                yield "image in answer", f"message {number}"
            if any(part["type"] == "text" and part["text"] is None for part in parts):
                yield "text", f"the text of message {number} is not a string"
                continue
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            if not text.strip() and message["role"] == "assistant":
                yield "empty answer", f"message {number}"
            elif not text.strip() and message["role"] == "user" and not any(p["type"] == "image" for p in parts):
                yield "empty question", f"message {number}"
            elif message["role"] == "user" and not num_images and is_image_text(text):
                yield "image path as text", f"message {number} is only {text[:60]!r}, and the row has no image"
            for token in self.control_tokens:
                if token in text:
                    yield "control token", f"message {number} contains {token!r}"
        if num_marks != num_images:
            yield "image count", f"{num_marks} marks, {num_images} images"

    def encoding_problems(self, length: int, num_supervised_tokens: int, num_images: int):
        """Yield the problems of the tokens of a row."""
        if not num_supervised_tokens and self.require_answers and self.require_marks:
            yield {"kind": "nothing supervised", "detail": "no answer token is supervised"}
        if self.max_length is not None and length > self.max_length:
            tokens = f"{num_images * self.tokens_per_image} of them image tokens"
            detail = f"{length} tokens, {tokens}; max_length is {self.max_length}"
            yield {"kind": "too long", "detail": detail, "value": length}


def _result(
    length: int, num_supervised: int, num_images: int, answers: list[str], unknown: list[str], problems: list[dict]
) -> dict:
    """Return the values of `RESULT_FEATURES` for one row."""
    return {
        "length": length,
        "num_supervised_tokens": num_supervised,
        "num_images": num_images,
        "num_answers": len(answers),
        "unknown_answer": unknown[0] if unknown else "",
        "num_unknown_answers": len(unknown),
        "problems": [{"image": None, "value": None, **problem} for problem in problems],
    }


def _text(parts: list[dict]) -> str:
    return "".join(part["text"] for part in parts if part["type"] == "text" and isinstance(part["text"], str))


def image_problems(image: dict):
    """Yield the kind, detail and path of each problem of an undecoded image, `{"path", "bytes"}`."""
    path = image["path"]
    if image["bytes"] is None and path is not None and os.pardir in path.split(os.sep):
        yield "image path", "leaves the image folder", path
        return
    try:
        open_image(image)
    except FileNotFoundError:
        yield "missing image", "the file does not exist", path
    except ImageError as error:
        yield "broken image", str(error).removeprefix(f"{path}: "), path


def image_tokens_per_image(processor) -> int:
    """
    Return the number of image tokens of one image.

    Raises:
        `ValueError`: if the image processor gives images of different sizes, which cannot be in one batch.
    """
    if isinstance(processor, TextProcessor):
        return processor.tokens_per_image
    height, width = processed_size(processor.image_processor)
    if hasattr(processor, "num_image_tokens"):
        return processor.num_image_tokens(height, width)
    # The LlavaProcessor of an exported model
    number = (height // processor.patch_size) * (width // processor.patch_size)
    return number + processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
