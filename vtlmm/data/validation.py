# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Looks at every row and every image before anything is trained: what is broken, where, and how to mend it."""

import os
import warnings
from dataclasses import dataclass

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.utils import tqdm

from .encoding import describe_row, encode_messages, require_end_of_turn
from .images import ImageError, open_image, processed_size
from .rows import ROW_FEATURES


# kind of problem: how to mend it
FIXES = {
    "no messages": "give the row a question and an answer, or remove it",
    "roles": "an optional system message first, then user and assistant in turn, an answer last",
    "text": "write every text as a string",
    "control token": "remove it, or write it in other characters: the model would read it as a command",
    "empty question": "give the question words or a image, or remove the row",
    "empty answer": "write the answer, or remove the turn: nothing can be learnt from it",
    "image count": "give every image one <image> mark in a question, and every mark one image",
    "missing image": "restore the file, correct its path, or set image_folder to where the paths start",
    "image path": "write paths inside image_folder, without `..`",
    "broken image": "get the file again (a download that was cut?), or remove the row",
    "chat template": "change the messages, or the processor's chat_template.jinja",
    "nothing supervised": "an answer after the context messages (num_context_messages) must have words",
    "too long": "raise max_length, or split the row: rows and images are never cut",
}
RESULT_FEATURES = Features(
    {
        "length": Value("int64"),
        "num_supervised_tokens": Value("int64"),
        "num_images": Value("int64"),
        "problems": List({"kind": Value("string"), "detail": Value("string"), "image": Value("string")}),
    }
)
# Below this many rows a second process costs more than it saves
ROWS_PER_PROCESS = 500


@dataclass
class Problem:
    """One thing that is wrong with one row."""

    row: int
    kind: str
    detail: str
    image: str | None = None

    @property
    def fix(self) -> str:
        return FIXES[self.kind]

    def __str__(self) -> str:
        return f"row {self.row}: {self.kind}: {self.detail}{f' ({self.image})' if self.image else ''}"


@dataclass
class DataReport:
    r"""
    What [`check_rows`] found.

    Attributes:
        lengths (`list[int]`): tokens of each row with all its image tokens; 0 for a row that cannot be encoded.
        num_supervised_tokens, num_images, num_text_only_rows (`int`)
        problems (`list[Problem]`): in the order of the rows.
        max_length (`int`, *optional*)
        sample (`str`): the first good row, decoded, its supervised part between ⟦ and ⟧.
    """

    lengths: list[int]
    num_supervised_tokens: int
    num_images: int
    num_text_only_rows: int
    problems: list[Problem]
    max_length: int | None = None
    sample: str = ""

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def good_rows(self) -> list[int]:
        """Indices of the rows without a problem."""
        bad = {problem.row for problem in self.problems}
        return [i for i in range(self.num_rows) if i not in bad]

    def length_percentiles(self) -> dict[str, int]:
        """50 %, 90 % and 99 % of the rows have at most so many tokens; `max` is the longest."""
        lengths = sorted(length for length in self.lengths if length) or [0]
        percentiles = {f"{p}%": lengths[-(-len(lengths) * p // 100) - 1] for p in (50, 90, 99)}
        return {**percentiles, "max": lengths[-1]}

    def format(self, limit: int = 20) -> str:
        """The report as text, with at most `limit` problems."""
        total = sum(self.lengths)
        share = 100 * self.num_supervised_tokens / max(total, 1)
        tokens = ", ".join(f"{name} {value:,}" for name, value in self.length_percentiles().items())
        limit_text = f" (max_length {self.max_length:,})" if self.max_length else ""
        lines = [
            f"rows        {self.num_rows:,}, {self.num_text_only_rows:,} of them without a image",
            f"images    {self.num_images:,}",
            f"row tokens  {tokens}{limit_text}",
            f"supervised  {self.num_supervised_tokens:,} of {total:,} tokens ({share:.1f} %)",
        ]
        if self.sample:
            lines += ["one row, its supervised part between ⟦ ⟧:", *(f"  {line}" for line in self.sample.splitlines())]
        return "\n".join(lines + self._problem_lines(limit))

    def _problem_lines(self, limit: int) -> list[str]:
        if not self.problems:
            return ["problems    none"]
        num_bad_rows = len({problem.row for problem in self.problems})
        lines = [f"problems    {len(self.problems):,} in {num_bad_rows:,} of {self.num_rows:,} rows"]
        lines += [f"  {problem}" for problem in self.problems[:limit]]
        if len(self.problems) > limit:
            lines.append(f"  … and {len(self.problems) - limit:,} more")
        kinds = dict.fromkeys(problem.kind for problem in self.problems)
        return lines + ["how to mend"] + [f"  {kind}: {FIXES[kind]}" for kind in kinds]

    def raise_for_problems(self, limit: int = 20) -> None:
        """
        Raises:
            `ValueError`: one for all problems; names at most `limit` of them.
        """
        if self.problems:
            advice = "`bad_rows: skip` trains on the other rows."
            raise ValueError("\n".join(["The data have broken rows.", *self._problem_lines(limit), advice]))


# ---- One row ----


class RowChecker:
    """
    Finds what is wrong with one row whose images are not decoded yet.

    Args:
        processor ([`VTLMMProcessor`])
        max_length (`int`, *optional*)
        images (`bool`, *optional*, defaults to `True`): whether to decode the images.

    Raises:
        `ValueError`: when the chat template does not mark the answers or gives them no end, or images come out in
            different sizes.
    """

    def __init__(self, processor, max_length: int | None = None, images: bool = True):
        require_end_of_turn(processor)
        self.processor = processor
        self.max_length = max_length
        self.images = images
        self.tokens_per_image = image_tokens_per_image(processor)
        tokens = {*processor.tokenizer.all_special_tokens, processor.image_token}
        self.control_tokens = sorted(token for token in tokens if token)

    def __call__(self, row: dict) -> dict:
        """`length`, `num_supervised_tokens`, `num_images`, and `problems` as (kind, detail, image)."""
        messages, images = row["messages"], row["images"]
        problems = [(kind, detail, None) for kind, detail in self.message_problems(messages, len(images))]
        length = num_supervised_tokens = 0
        if not problems:
            try:
                input_ids, supervised = encode_messages(self.processor, messages, row.get("num_context_messages") or 0)
            except ValueError as error:
                problems.append(("chat template", str(error), None))
            else:
                length = len(input_ids) + len(images) * (self.tokens_per_image - 1)
                num_supervised_tokens = int(supervised.sum())
                problems += self.encoding_problems(length, num_supervised_tokens, len(images))
        for image in images if self.images else ():
            problems += image_problems(image)
        return {
            "length": length,
            "num_supervised_tokens": num_supervised_tokens,
            "num_images": len(images),
            "problems": [{"kind": kind, "detail": detail, "image": image} for kind, detail, image in problems],
        }

    def message_problems(self, messages: list[dict], num_images: int):
        """Yields (kind, detail)."""
        if not messages:
            yield "no messages", "the conversation is empty"
            return
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        if turns != ["user", "assistant"] * (len(turns) // 2) or not turns:
            yield "roles", ", ".join(str(role) for role in roles)
        num_marks = 0
        for number, message in enumerate(messages):
            parts = message["content"]
            num_marks += sum(part["type"] == "image" for part in parts)
            if any(part["type"] not in ("text", "image") for part in parts):
                yield "text", f"message {number} has a part that is neither text nor image"
            if any(part["type"] == "text" and part["text"] is None for part in parts):
                yield "text", f"the text of message {number} is not a string"
                continue
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            if not text.strip() and message["role"] == "assistant":
                yield "empty answer", f"message {number}"
            elif not text.strip() and message["role"] == "user" and not any(p["type"] == "image" for p in parts):
                yield "empty question", f"message {number}"
            for token in self.control_tokens:
                if token in text:
                    yield "control token", f"message {number} contains {token!r}"
        if num_marks != num_images:
            yield "image count", f"{num_marks} marks, {num_images} images"

    def encoding_problems(self, length: int, num_supervised_tokens: int, num_images: int):
        """Yields (kind, detail, None)."""
        if not num_supervised_tokens:
            yield "nothing supervised", "no answer token is a target", None
        if self.max_length is not None and length > self.max_length:
            tokens = f"{num_images * self.tokens_per_image} of them image tokens"
            yield "too long", f"{length} tokens, {tokens}; max_length is {self.max_length}", None


def image_problems(image: dict):
    """Yields (kind, detail, path) of one image as `datasets` stores it, `{"path", "bytes"}`; decodes all of it."""
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
    return processor.num_image_tokens(*processed_size(processor.image_processor))


# ---- All rows ----


def check_rows(
    dataset: Dataset | IterableDataset,
    processor,
    max_length: int | None = None,
    num_proc: int | None = None,
    images: bool = True,
) -> DataReport:
    r"""
    Reads every row and decodes every image, and counts tokens as the collator will make them.

    Always from the files: images may change where rows do not. The processes of a distributed run share the rows
    of a dataset that is not streamed, and each gets the whole report.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): rows of [`load_rows`]; a stream is read to
            its end.
        processor ([`VTLMMProcessor`])
        max_length (`int`, *optional*): longest row in tokens.
        num_proc (`int`, *optional*): processes; by default as many as there are cores, for many rows.
        images (`bool`, *optional*, defaults to `True`): `False` leaves them closed, which is all that lengths need.

    Raises:
        `ValueError`: for a chat template without generation marks or end of turn, or no rows at all.
    """
    checker = RowChecker(processor, max_length, images)
    if isinstance(dataset, IterableDataset):
        dataset = dataset.decode(False)
        results = [checker(row) for row in tqdm(dataset, desc="Checking rows")]
    else:
        dataset = dataset.cast_column("images", List(Image(decode=False)))
        results = gather_object(_check_share(dataset, checker, num_proc))
    if not results:
        raise ValueError("There are no rows: look at dataset, dataset_split and max_rows.")
    report = DataReport(
        lengths=[result["length"] for result in results],
        num_supervised_tokens=sum(result["num_supervised_tokens"] for result in results),
        num_images=sum(result["num_images"] for result in results),
        num_text_only_rows=sum(not result["num_images"] for result in results),
        problems=[Problem(i, **problem) for i, result in enumerate(results) for problem in result["problems"]],
        max_length=max_length,
    )
    good = next(iter(report.good_rows), None)
    if good is not None:
        row = next(iter(dataset.skip(good)))
        report.sample = mark_supervised(processor, row)
    return report


def _check_share(dataset: Dataset, checker: RowChecker, num_proc: int | None) -> list[dict]:
    """The results of this process's rows. One process for all would keep the others waiting past their time limit."""
    state = PartialState()
    if state.process_index >= len(dataset) > 0:  # `shard` makes no empty share
        return []
    share = dataset.shard(state.num_processes, state.process_index, contiguous=True)
    if num_proc is None:
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        num_cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        num_proc = min(num_cores, len(share) // ROWS_PER_PROCESS)
    return share.map(
        checker,
        remove_columns=dataset.column_names,
        features=RESULT_FEATURES,
        num_proc=num_proc if num_proc > 1 else None,
        keep_in_memory=True,  # so there is no cache to read either
        new_fingerprint="unused",  # else the processor would be hashed
        desc="Checking rows",
    ).to_list()


def mark_supervised(processor, row: dict) -> str:
    """One row as the model reads it, one image token a image, its supervised part between ⟦ and ⟧."""
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
    The rows of a stream, each checked as it comes; costs a second decoding of its images.

    Args:
        dataset ([`~datasets.IterableDataset`]): rows of [`load_rows`], not shuffled yet.
        processor ([`VTLMMProcessor`])
        max_length (`int`, *optional*)
        bad_rows (`str`, *optional*, defaults to `"raise"`): or `"skip"`, which warns of each.

    Raises:
        `ValueError`: at a broken row, when it comes.
    """
    checker, num_shards = RowChecker(processor, max_length), dataset.num_shards

    def keep_good(batch: dict, indices: list[int]) -> dict:
        row, index = {name: values[0] for name, values in batch.items()}, indices[0]
        problems = [Problem(index, **problem) for problem in checker(row)["problems"]]
        if not problems:
            return batch
        text = "; ".join(f"{problem}. Mend: {problem.fix}" for problem in problems) + f". It is {describe_row(row)}."
        if num_shards > 1:
            text += " (Rows of a stream of several files are counted as they come, by each worker for itself.)"
        if bad_rows == "raise":
            raise ValueError(f"A broken row in the stream: {text} `bad_rows: skip` trains on the other rows.")
        warnings.warn(f"Skipped a broken row of the stream: {text}")
        return {name: [] for name in batch}

    # `filter` would leave the images undecoded: a stream applies its features once, where they are first known
    rows = dataset.decode(False).map(keep_good, with_indices=True, batched=True, batch_size=1)
    return rows.cast(ROW_FEATURES)
