# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Check every row and every image before training: what is invalid, where it is, and how to fix it."""

import os
import warnings

import numpy as np
import pyarrow as pa
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.utils import tqdm

from .arrow_rows import ROWS_PER_BATCH, batches, python_rows, rows_table
from .data_report import DataReport, Problem, make_report
from .encoding import (
    control_tokens,
    describe_row,
    encode_conversations,
    encode_messages,
    require_end_of_turn,
    unknown_only_as_text,
)
from .image_values import is_image_text
from .images import ImageError, open_image, processed_size
from .rows import ROW_FEATURES
from .setting_values import require_integers


RESULT_FEATURES = Features(
    {
        "length": Value("int64"),
        "num_supervised_tokens": Value("int64"),
        "num_images": Value("int64"),
        "num_answers": Value("int64"),
        "unknown_answer": Value("string"),
        "num_unknown_answers": Value("int64"),
        "problems": List(
            {"kind": Value("string"), "detail": Value("string"), "image": Value("string"), "value": Value("int64")}
        ),
    }
)
# With fewer rows, starting a second process takes longer than it saves
ROWS_PER_PROCESS = 500
# Image files whose result is kept, about 20 MB
MAX_CHECKED_FILES = 2**16


# ---- One row ----


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
        good = [i for i, found in enumerate(problems) if not found]
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
            for image in row["images"] if self.images else ():
                problems[i] += [
                    {"kind": kind, "detail": text, "image": path} for kind, text, path in self._image_problems(image)
                ]
            results.append(
                {
                    "length": lengths[i],
                    "num_supervised_tokens": num_supervised[i],
                    "num_images": len(row["images"]),
                    "num_answers": len(answers[i]),
                    "unknown_answer": unknown[i][0] if unknown[i] else "",
                    "num_unknown_answers": len(unknown[i]),
                    "problems": [{"image": None, "value": None, **problem} for problem in problems[i]],
                }
            )
        return results

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
        texts = [answer for row in answers for answer in row if token is None or token in answer]
        unknown: set[str] = set()
        if texts:
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
    height, width = processed_size(processor.image_processor)
    if hasattr(processor, "num_image_tokens"):
        return processor.num_image_tokens(height, width)
    # The LlavaProcessor of an exported model
    number = (height // processor.patch_size) * (width // processor.patch_size)
    return number + processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")


def position_limit(config) -> int | None:
    """Return the number of positions of a model's decoder, None if its config does not say it."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


# ---- All rows ----


def check_rows(
    dataset: Dataset | IterableDataset,
    processor,
    max_length: int | None = None,
    num_proc: int | None = None,
    images: bool = True,
    require_answers: bool = True,
    max_positions: int | None = None,
    require_marks: bool = True,
) -> DataReport:
    r"""
    Check every row, decode every image, and count the tokens that the collator will make.

    The result is never cached: an image file can change while its row does not. The processes of a distributed run
    share the rows of a dataset that is not streamed, and each process gets the whole report.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): rows of [`load_rows`]. A stream is read to
            its end.
        processor ([`VTLMMProcessor`])
        max_length (`int`, *optional*): longest valid row in tokens.
        num_proc (`int`, *optional*): number of processes. Default: the number of cores, for many rows.
        images (`bool`, *optional*, defaults to `True`): False does not open images, for the lengths alone.
        require_answers (`bool`, *optional*, defaults to `True`): False accepts rows that end with a question.
        max_positions (`int`, *optional*): number of positions of the decoder, see [`position_limit`]. It bounds
            `max_length`.
        require_marks (`bool`, *optional*, defaults to `True`): False accepts a chat template that does not mark the
            answers, for rows that a model is asked but not trained on.

    Raises:
        `ValueError`: if the chat template does not mark the answers or their end, or there are no rows.
    """
    require_integers(max_length=max_length, max_positions=max_positions)
    max_length = min((n for n in (max_length, max_positions) if n is not None), default=None)
    checker = RowChecker(processor, max_length, images, require_answers, require_marks)
    if isinstance(dataset, IterableDataset):
        dataset = dataset.decode(False)
        rows = tqdm(dataset, desc="Checking rows")
        tables = [rows_table(checker.check(batch), RESULT_FEATURES) for batch in batches(rows)]
    else:
        dataset = dataset.cast_column("images", List(Image(decode=False)))
        tables = gather_object(_check_share(dataset, checker, num_proc))
    if not sum(map(len, tables)):
        raise ValueError("There are no rows. Check dataset, dataset_split and max_rows.")
    report = make_report(pa.concat_tables(tables), max_length, max_positions)
    good = next(iter(report.good_rows), None)
    if good is not None and require_marks:
        row = next(iter(dataset.skip(good)))
        report.sample = mark_supervised(processor, row)
    return report


def _check_share(dataset: Dataset, checker: RowChecker, num_proc: int | None) -> list[pa.Table]:
    """Return the results of this process's rows. If one process checked all rows, the others would time out."""
    state = PartialState()
    if state.process_index >= len(dataset) > 0:  # `shard` does not return an empty shard
        return []
    share = dataset.shard(state.num_processes, state.process_index, contiguous=True)
    share = share.select_columns([name for name in ROW_FEATURES if name in share.column_names])
    if num_proc is None:
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        num_proc = min(num_cores, len(share) // ROWS_PER_PROCESS)
    results = share.with_format("arrow").map(
        _check_table,
        batched=True,
        batch_size=ROWS_PER_BATCH,
        fn_kwargs={"checker": checker},
        remove_columns=share.column_names,
        features=RESULT_FEATURES,
        num_proc=num_proc if num_proc > 1 else None,
        keep_in_memory=True,  # no cache is written or read
        new_fingerprint="unused",  # `datasets` would hash the processor
        desc="Checking rows",
    )
    return [results.with_format("arrow")[:]]


def _check_table(table: pa.Table, checker: RowChecker) -> pa.Table:
    return rows_table(checker.check(python_rows(table)), RESULT_FEATURES)


def mark_supervised(processor, row: dict) -> str:
    """Return a row as the model reads it, one image token per image, with its supervised part between ⟦ and ⟧."""
    input_ids, supervised = encode_messages(processor, row["messages"], row.get("num_context_messages") or 0)
    changes = (supervised[1:] != supervised[:-1]).nonzero().flatten() + 1
    runs = zip(input_ids.tensor_split(changes), supervised.tensor_split(changes), strict=True)
    return "".join(
        f"⟦{processor.tokenizer.decode(ids)}⟧" if marked[0] else processor.tokenizer.decode(ids)
        for ids, marked in runs
    )


def checked_stream(
    dataset: IterableDataset, processor, max_length: int | None = None, bad_rows: str = "raise"
) -> IterableDataset:
    r"""
    Check each row of a stream when it is read. Images are decoded a second time for the check.

    Args:
        dataset ([`~datasets.IterableDataset`]): rows of [`load_rows`], not shuffled.
        processor ([`VTLMMProcessor`])
        max_length (`int`, *optional*): longest valid row in tokens.
        bad_rows (`str`, *optional*, defaults to `"raise"`): or `"skip"`, with a warning for each invalid row.

    Raises:
        `ValueError`: at the first invalid row.
    """
    checker, num_shards = RowChecker(processor, max_length), dataset.num_shards

    def keep_good(batch: dict, indices: list[int]) -> dict:
        row, index = {name: values[0] for name, values in batch.items()}, indices[0]
        problems = [Problem(index, **problem) for problem in checker(row)["problems"]]
        if not problems:
            return batch
        text = "; ".join(f"{problem}. Fix: {problem.fix}" for problem in problems) + f". This is {describe_row(row)}."
        if num_shards > 1:
            text += " (With several files, each worker counts the rows that it reads.)"
        if bad_rows == "raise":
            raise ValueError(f"Invalid row in the stream: {text} Set `bad_rows: skip` to train on the other rows.")
        warnings.warn(f"Skipped an invalid row of the stream: {text}")
        return {name: [] for name in batch}

    # `filter` would not decode the images: a stream decodes only in the first operation that knows its features
    rows = dataset.decode(False).map(keep_good, with_indices=True, batched=True, batch_size=1)
    return rows.cast(ROW_FEATURES)
