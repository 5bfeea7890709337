# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Training data of several forms, as rows of one form: `messages`, `images`, `num_context_messages`."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from datasets import Dataset, Features, Image, IterableDataset, List, ReadInstruction, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from .questions import split_row


ROW_FEATURES = Features(
    {
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(Image()),
        "num_context_messages": Value("int64"),
    }
)
FORMS = (
    "`messages` (role/content), `prompt` and `completion`, LLaVA's `conversations` (from/value), `questions` and "
    "`answers`, `question` and `answer`, or a image with a `caption` or `text`; images in `images` or `image`"
)
ROLES = {"human": "user", "gpt": "assistant"}
# A caption answers something: without a question the chat template would have an empty turn
CAPTION_QUESTION = "Describe the image."
IMAGE_MARK = re.compile(r"\s*<image>\s*")


@dataclass
class DataConfig:
    r"""
    The data of a training run.

    Parameters:
        dataset (`str`): a `.json`, `.jsonl` or `.parquet` file, a folder, or a Hub dataset id.
        dataset_config (`str`, *optional*): name of the configuration, where the Hub dataset has several.
        dataset_split (`str`, *optional*, defaults to `"train"`): split, or a slice of one as in `"train[:2000]"`. A
            file is one split, `"train"`.
        eval_dataset (`str`, *optional*): data for evaluation, if from elsewhere.
        eval_config (`str`, *optional*): the configuration for evaluation; by default that of the same Hub dataset.
        eval_split (`str`, *optional*): its split (by default `"train"`); alone, a split of `dataset`.
        eval_task_data (`str`, *optional*): a file of rows whose questions are answered at every evaluation and scored
            by exact match, with their images and with shuffled ones: `eval_accuracy`, `eval_accuracy_shuffled_images`.
        eval_task_images (`int`, *optional*, defaults to 100): only questions about the first so many images.
        image_folder (`str`, *optional*): where the images' paths start, by default beside the file that names them.
        streaming (`bool`, *optional*, defaults to `False`): read while training, keep nothing on the disk. Data for
            evaluation are never streamed: on several processes nobody could tell which rows fill up the last batch.
        max_rows (`int`, *optional*): only the first so many rows of each split.
        one_question_per_row (`bool`, *optional*, defaults to `False`): make a row of each question of a conversation,
            without those before it. In one row a small model finds answers in earlier ones instead of the image.
        check_data (`bool`, *optional*, defaults to `True`): look at every row and image before training.
        bad_rows (`str`, *optional*, defaults to `"raise"`): what the check does with broken rows, or `"skip"`.

    Raises:
        `ValueError`: without a dataset, for another value of `bad_rows`, or without a image in `eval_task_images`.
    """

    dataset: str | None = field(default=None, metadata={"help": "File (.json, .jsonl, .parquet), folder or Hub id."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split, or a slice of one: train[:2000]."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Data for evaluation, if from elsewhere."})
    eval_config: str | None = field(default=None, metadata={"help": "Configuration for evaluation, if another."})
    eval_split: str | None = field(default=None, metadata={"help": "Split for evaluation."})
    eval_task_data: str | None = field(default=None, metadata={"help": "File of questions to answer at evaluations."})
    eval_task_images: int = field(default=100, metadata={"help": "Only questions about the first so many images."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder where the images' paths start."})
    streaming: bool = field(default=False, metadata={"help": "Read while training, keep nothing on the disk."})
    max_rows: int | None = field(default=None, metadata={"help": "Only the first so many rows of each split."})
    one_question_per_row: bool = field(default=False, metadata={"help": "Split conversations into their questions."})
    check_data: bool = field(default=True, metadata={"help": "Look at all rows and images before training."})
    bad_rows: str = field(default="raise", metadata={"help": "What to do with broken rows: raise or skip."})

    def __post_init__(self):
        if not self.dataset:
            raise ValueError("`dataset` is not set: name a .json, .jsonl or .parquet file, a folder or a Hub dataset.")
        if self.eval_task_images < 1:
            raise ValueError("`eval_task_images` must be 1 or more.")
        if self.bad_rows not in ("raise", "skip"):
            raise ValueError(f"`bad_rows` is {self.bad_rows!r}; it must be raise or skip.")

    def load_rows(self, split: str = "train", keep_columns: Sequence[str] = ()) -> Dataset | IterableDataset | None:
        """
        Load the rows of `"train"` or `"eval"` with [`load_rows`]. Evaluation rows are never streamed.

        Returns:
            The rows, or None for `"eval"` if neither `eval_dataset` nor `eval_split` is set.
        """
        name, configuration, part = self.dataset, self.dataset_config, self.dataset_split
        if split == "eval":
            if self.eval_dataset is None and self.eval_split is None:
                return None
            name, part = self.eval_dataset or name, self.eval_split or "train"
            configuration = self.eval_config or (configuration if name == self.dataset else None)
        return load_rows(
            str(name),
            image_folder=self.image_folder,
            split=part,
            config_name=configuration,
            streaming=self.streaming and split == "train",
            keep_columns=keep_columns,
            max_rows=self.max_rows,
            one_question_per_row=self.one_question_per_row,
        )


def load_rows(
    dataset: str | os.PathLike,
    *,
    image_folder: str | os.PathLike | None = None,
    split: str = "train",
    config_name: str | None = None,
    streaming: bool = False,
    keep_columns: Sequence[str] = (),
    max_rows: int | None = None,
    one_question_per_row: bool = False,
    require_answers: bool = True,
) -> Dataset | IterableDataset:
    r"""
    Load the rows of one split, in order, with the columns of `ROW_FEATURES`. No image is decoded.

    - `messages`: `role` and `content`, a list of `{"type", "text"}`. `text` is None for an image and for a value that
      is not a string. An `<image>` in a text becomes an image part in its place. A row with images and without
      `<image>` has the images at the start of the first question.
    - `images`: decoded when a row is read; empty for a row without images.
    - `num_context_messages`: answers among the first `num_context_messages` messages are not supervised.

    Args:
        dataset (`str`): a `.json`, `.jsonl` or `.parquet` file, a folder, or a Hub dataset id.
        image_folder (`str`): folder that relative image paths start from. Default: the folder of the file.
        split (`str`): split, or a slice of a split such as `"train[:2000]"`. A file has the split `train` only.
        config_name (`str`): configuration of a Hub dataset.
        streaming (`bool`): return an [`~datasets.IterableDataset`] that reads rows when they are used.
        keep_columns: columns of the source to keep, as JSON texts (`null` if a row does not have the column).
        max_rows (`int`): read at most this number of rows.
        one_question_per_row (`bool`): split conversations with [`split_questions`].
        require_answers (`bool`): False also accepts questions without answers. Such a row ends with the user's
            message.

    Raises:
        `ValueError`: if a row matches no format, a file is not JSON, or `image_folder` is needed and missing.
        `FileNotFoundError`: if the file does not exist.
    """
    name, keep_columns = os.fspath(dataset), tuple(keep_columns)
    path = Path(name)
    is_file = path.suffix in (".json", ".jsonl", ".parquet")
    if is_file and not path.is_file():
        raise FileNotFoundError(f"{name}: the file does not exist.")
    folder = image_folder or (path.parent if is_file else path if path.is_dir() else None)
    folder = None if folder is None else os.path.abspath(folder)
    options = (keep_columns, require_answers)
    if path.suffix in (".json", ".jsonl"):
        rows = _first_rows(_load_json(path, split, folder, streaming, *options), max_rows)
    else:
        source = {"path": "parquet", "data_files": name} if is_file else {"path": name, "name": config_name}
        table = load_dataset(**source, split=split, streaming=streaming)
        rows = convert_dataset(_first_rows(table, max_rows), name, folder, *options)
    return _one_question_per_row(rows) if one_question_per_row else rows


def _row_features(columns: tuple[str, ...]) -> Features:
    return Features({**ROW_FEATURES, **{name: Value("string") for name in columns}})


def _first_rows(dataset, max_rows: int | None):
    if max_rows is None:
        return dataset
    return dataset.take(max_rows if isinstance(dataset, IterableDataset) else min(max_rows, len(dataset)))


# ---- JSON files. Read by Python: Arrow wants one type per column, and LLaVA's files mix them ----


def _read_json(path: Path):
    """The records of a `.json` list or of the lines of a `.jsonl` file."""
    with open(path, encoding="utf-8") as file:
        if path.suffix == ".json":
            try:
                records = json.load(file)
            except ValueError as error:
                raise ValueError(f"{path} is not JSON: {error}. With one record a line, name it .jsonl.") from error
            if not isinstance(records, list):
                raise ValueError(f"{path} must hold a list of records, not a {type(records).__name__}.")
            yield from records
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error


def _json_rows(path: str, folder: str, columns: tuple[str, ...], require_answers: bool):
    for index, record in enumerate(_read_json(Path(path))):
        yield convert_row(record, index, path, folder, columns, require_answers)


def _load_json(path: Path, split: str, folder: str, streaming: bool, columns: tuple[str, ...], require_answers: bool):
    arguments = {"path": str(path), "folder": folder, "columns": columns, "require_answers": require_answers}
    features = _row_features(columns)
    if streaming:
        if split != "train":
            raise ValueError(f"{path}: a stream of a JSON file has the split train only, not {split!r}.")
        return IterableDataset.from_generator(_json_rows, features=features, gen_kwargs=arguments)
    state = path.stat()
    fingerprint = _fingerprint(path.resolve(), state.st_size, state.st_mtime_ns, folder, columns, require_answers)
    try:
        rows = Dataset.from_generator(_json_rows, features=features, gen_kwargs=arguments, fingerprint=fingerprint)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise
    [part] = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    return rows.select(range(part.from_ or 0, len(rows) if part.to is None else part.to))


def _fingerprint(*state) -> str:
    """Names the cache of converted rows. `datasets` knows functions by their name only: after a change of this file it
    would go on with old rows."""
    return Hasher.hash([Path(__file__).read_text(encoding="utf-8"), *map(str, state)])


# ---- Tables: parquet files, folders, the Hub ----


def convert_dataset(
    dataset, source: str, folder: str | None = None, columns: tuple[str, ...] = (), require_answers: bool = True
):
    """
    Return the rows of a `Dataset` or `IterableDataset` with the columns of `ROW_FEATURES`; see [`convert_row`].
    """
    arguments = {"source": source, "folder": folder, "columns": columns, "require_answers": require_answers}
    features = _row_features(columns)
    if isinstance(dataset, IterableDataset):
        dataset = dataset if dataset.features is None else dataset.decode(False)
        # A stream decodes images where its features are applied, which is once: so not in `map`
        rows = dataset.map(convert_row, with_indices=True, fn_kwargs=arguments, remove_columns=dataset.column_names)
        return rows.select_columns(list(features)).cast(features)
    for column in ("image", "images"):
        feature = dataset.features.get(column)
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    return dataset.map(
        convert_row,
        with_indices=True,
        fn_kwargs=arguments,
        remove_columns=dataset.column_names,
        features=features,
        new_fingerprint=_fingerprint(dataset._fingerprint, source, folder, columns, require_answers),
        desc=f"Reading {source}",
    )


# ---- Conversations as questions ----


def _one_question_per_row(dataset):
    if isinstance(dataset, IterableDataset):
        return dataset.decode(False).map(_split_batch, batched=True).cast(dataset.features)
    return dataset.cast_column("images", List(Image(decode=False))).map(
        _split_batch,
        batched=True,
        features=dataset.features,
        new_fingerprint=_fingerprint(dataset._fingerprint),
        desc="One question per row",
    )


def _split_batch(batch: dict) -> dict:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    rows = [new for row in rows for new in split_row(row)]
    return {name: [row[name] for row in rows] for name in batch}


# ---- One row ----


def convert_row(
    row: dict,
    index: int,
    source: str,
    folder: str | None,
    columns: tuple[str, ...] = (),
    require_answers: bool = True,
) -> dict:
    r"""
    One row of any known form as `messages`, `images`, `num_context_messages`.

    What is broken inside a known form stays broken, for the check to find and name.

    Args:
        row (`dict`), index (`int`), source (`str`): the row, and how an error names it.
        folder (`str`, *optional*): where relative paths of images start; absolute.
        columns (`tuple[str]`, *optional*): what to keep beside these, as JSON texts.

    Raises:
        `ValueError`: for a row of no known form, or a relative path without a folder.
    """
    where = f"{source}, row {index}"
    row = dict(row) if isinstance(row, Mapping) else {}
    # Every row of a table has all columns: an empty one does not decide the form
    given = {key for key, value in row.items() if value is not None}
    images = _as_list(row["images"] if "images" in given else row.get("image"))
    num_context_messages = 0
    if "messages" in given or "conversations" in given:
        messages = _messages(row["messages"] if "messages" in given else row["conversations"])
    elif "prompt" in given and "completion" in row:
        context = _messages(row["prompt"], "user")
        num_context_messages = len(context)
        messages = context + _messages(row["completion"], "assistant")
    elif "questions" in given and "answers" in row:
        messages = _turns(row["questions"], row["answers"])
    elif "question" in given and "answer" in row:
        messages = _turns(row["question"], row["answer"])
    elif "question" in given and not require_answers:
        messages = [_message("user", row["question"])]
    elif images and given & {"caption", "text"}:
        messages = _turns(CAPTION_QUESTION, row["caption"] if "caption" in given else row["text"])
    else:
        raise ValueError(f"{where} has only {sorted(given)}, which is no known form. A row needs {FORMS}.")
    if images and not any(part["type"] == "image" for message in messages for part in message["content"]):
        first = next((message for message in messages if message["role"] == "user"), {"content": []})
        first["content"] = [{"type": "image", "text": None} for _ in images] + first["content"]
    return {
        "messages": messages,
        "images": [_image(image, where, folder) for image in images],
        "num_context_messages": num_context_messages,
        **{name: json.dumps(row.get(name), ensure_ascii=False, default=str) for name in columns},
    }


def _as_list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _turns(questions, answers) -> list[dict]:
    turns = zip_longest(_as_list(questions), _as_list(answers))
    return [m for q, a in turns for m in (_message("user", q), _message("assistant", a))]


def _messages(value, role: str | None = None) -> list[dict]:
    """`value` is a list of messages, or where `role` is given a text of it."""
    if role is not None and not isinstance(value, list):
        return [_message(role, value)]
    turns = [turn if isinstance(turn, dict) else {} for turn in _as_list(value)]
    return [_message(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in turns]


def _message(role, content) -> dict:
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    flat = []
    for part in parts:
        part = part if isinstance(part, dict) else {"type": "text", "text": part}
        if part.get("type") == "text":
            flat += _text_parts(part.get("text"))
        else:
            flat.append({"type": _string(part.get("type")), "text": None})
    return {"role": ROLES.get(_string(role), _string(role)), "content": flat}


def _text_parts(text) -> list[dict]:
    """A text with `<image>` marks as parts of a message."""
    text = _string(text)
    if text is None:
        return [{"type": "text", "text": None}]
    parts = []
    for i, piece in enumerate(IMAGE_MARK.split(text)):
        if i:
            parts.append({"type": "image", "text": None})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _string(value) -> str | None:
    """None for what is no string, or one with a lone surrogate, which Arrow cannot hold."""
    if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
        return None
    return value


def _image(value, where: str, folder: str | None) -> dict:
    """`{"path", "bytes"}`. A relative path that leaves `folder` keeps a `..`, by which the check knows it."""
    if isinstance(value, dict) and (value.get("bytes") is not None or value.get("path") is not None):
        return {"path": value.get("path"), "bytes": value.get("bytes")}
    if isinstance(value, bytes):
        return {"path": None, "bytes": value}
    if not isinstance(value, str):
        return {"path": str(value)[:60], "bytes": None}
    if os.path.isabs(value):
        return {"path": os.path.normpath(value), "bytes": None}
    if folder is None:
        raise ValueError(f"{where} names the image {value!r}: set image_folder to where such paths start.")
    path = os.path.relpath(os.path.join(folder, value), folder)
    return {"path": os.path.join(folder, path), "bytes": None}
