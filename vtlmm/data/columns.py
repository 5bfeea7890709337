# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Rename columns, reject columns that would be ignored, and suggest a mapping for unknown columns."""

import os
from collections.abc import Mapping
from typing import Any

import yaml

from .image_values import is_image_text, looks_like_image


# Columns that a format reads. A row that has one of them in addition to the columns of its format is rejected.
KNOWN_COLUMNS = frozenset(
    "messages conversations conversation texts prompt completion questions answers question answer query response "
    "instruction input output caption captions text multiple_choice_answer label num_context_messages images image "
    "system system_prompt history".split()
)
# Columns of other formats whose content would change the question or the answer
UNSUPPORTED_COLUMNS = {
    **dict.fromkeys(("tools", "functions", "tool_calls"), "Tool calls are not supported."),
    **dict.fromkeys(("videos", "video", "audios", "audio"), "Only images are supported."),
    **dict.fromkeys(
        ("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images"),
        "Preference pairs are not supported.",
    ),
    **dict.fromkeys(
        ("choices", "options", "context", "hint", "passage", "lecture"), "Write its text into the question."
    ),
    **dict.fromkeys(("objects", "bbox", "bboxes"), "Boxes are not supported."),
    **dict.fromkeys(("chat_template_kwargs", "assistant_prefix"), "It would change the prompt."),
}
# Names of columns that identify an image which the row already has
IDENTIFIERS = ("id", "url", "name", "key", "source", "file_path")
QUESTION_NAMES = ("question", "ask", "query", "prompt", "instruction", "problem", "user", "input")
ANSWER_NAMES = ("answer", "reply", "response", "output", "label", "solution", "target", "assistant", "ground_truth")
CAPTION_NAMES = ("caption", "text", "description", "title", "sentence")


def parse_columns(text: str | None) -> dict[str, Any] | None:
    """
    Return the column mapping of a command line: `image=photo,question=ask`, or a mapping in YAML as in a recipe.

    `photo=` ignores the column `photo`. Several names for `images` are repeated: `images=left,images=right`.

    Raises:
        `ValueError`: if the text has neither form, and see [`check_columns`].
    """
    if text is None:
        return None
    if text.lstrip().startswith("{"):
        try:
            mapping = yaml.safe_load(text)
            check_columns(mapping)
            return mapping
        except yaml.YAMLError as error:
            raise ValueError(f"`columns` is not a mapping: {text}. Write image=photo,question=ask.") from error
    columns: dict[str, Any] = {}
    for pair in text.split(","):
        target, sign, source = (part.strip() for part in pair.partition("="))
        if not (target and sign):
            raise ValueError(f"`columns` has {pair!r}. Write the name of the format first: image=photo,question=ask.")
        value: Any = None if source in ("", "null") else source
        if target in columns:
            value = [*(columns[target] if isinstance(columns[target], list) else [columns[target]]), value]
        columns[target] = value
    check_columns(columns)
    return columns


def format_columns(columns: Mapping[str, str | None]) -> str:
    """Return a column mapping as a recipe and as a command line have it."""
    recipe = ", ".join(f"{target}: {'null' if source is None else source}" for target, source in columns.items())
    option = ",".join(f"{target}={source or ''}" for target, source in columns.items())
    return f"`columns: {{{recipe}}}` (`--columns {option}`)"


def check_columns(columns: Any) -> None:
    """
    Raises:
        `ValueError`: if `columns` is not a mapping of supported columns to column names, lists of names or None.
    """
    if columns is None:
        return
    if not isinstance(columns, Mapping):
        raise ValueError(f"`columns` is {columns!r}. It must be a mapping such as {{image: photo, question: ask}}.")
    for target, source in columns.items():
        is_list = isinstance(source, list) and all(isinstance(name, str) for name in source)
        if not (source is None or isinstance(source, str) or (is_list and target == "images")):
            raise ValueError(f"`columns` maps {target!r} to {source!r}. It must be the name of a column, or null.")
        if source is not None and target not in KNOWN_COLUMNS:
            raise ValueError(
                f"`columns` gives a column the name {target!r}, which no format has. The name of the format comes "
                f"first: {{image: photo}}. Names: {', '.join(sorted(KNOWN_COLUMNS))}."
            )


def mapped_columns(columns: Mapping[str, Any]) -> set[str]:
    """Return the columns of a dataset that a mapping names."""
    return {name for value in columns.values() for name in ([value] if isinstance(value, str) else value or ())}


def apply_columns(row: dict, columns: Mapping[str, Any]) -> dict:
    r"""
    Return `row` with renamed columns.

    Args:
        columns: name of a supported column to name in the row, `{"image": "photo"}`; for `images` also a list of
            names. `{"photo": None}` ignores a column.
    """
    if not columns:
        return row
    sources = mapped_columns(columns)
    renamed = {key: value for key, value in row.items() if key not in sources and key not in columns}
    for target, source in columns.items():
        if isinstance(source, str):
            renamed[target] = row.get(source)
        elif source is not None:
            renamed[target] = [row[name] for name in source if row.get(name) is not None]
    return renamed


def check_unused(values: dict, used: set[str], conversations: list[list[dict]], images: list, where: str) -> None:
    """
    Reject a row with a column that has a meaning and would be ignored.

    Raises:
        `ValueError`: for a column of another format, an unsupported column, or images under another name.
    """
    for name in values.keys() - used:
        value = values[name]
        if name in UNSUPPORTED_COLUMNS and not _is_empty_json(value):
            reason = UNSUPPORTED_COLUMNS[name]
        elif name in KNOWN_COLUMNS and not _repeats(value, conversations):
            reason = f"This row is read from {sorted(used)}."
        elif looks_like_image(value) and not _identifies(name, value, images):
            reason = "It looks like an image."
            if not images:
                reason += f" If it is the image of the row, set {format_columns({'image': name})}."
        else:
            continue
        raise ValueError(
            f"{where}: column `{name}` would be ignored. {reason} Remove the column, or set "
            f"{format_columns({name: None})} to ignore it."
        )
    _check_swapped(values, images, where)


def _check_swapped(values: dict, images: list, where: str) -> None:
    """Raise if the question is an image path and the image is not."""
    question = values.get("question", values.get("query"))
    if images and is_image_text(question) and isinstance(images[0], str) and not is_image_text(images[0]):
        raise ValueError(
            f"{where}: the image is {images[0][:60]!r} and the question is {question!r}. The columns look swapped. "
            f"Set {format_columns({'image': 'question', 'question': 'image'})}."
        )


def _is_empty_json(value: Any) -> bool:
    return isinstance(value, str) and value.strip() in ("", "[]", "{}", "null")


def _repeats(value: Any, conversations: list[list[dict]]) -> bool:
    """Return whether a text repeats a message, or is the whole conversation as one text."""
    texts = [part["text"] for messages in conversations for message in messages for part in message["content"]]
    texts = [text for text in texts if text]
    if not isinstance(value, str) or not texts:
        return False
    return value.strip() in {text.strip() for text in texts} or all(text in value for text in texts)


def _identifies(name: str, value: Any, images: list) -> bool:
    """Return whether a path or URL names the image that the row already has."""
    if not images or not isinstance(value, str):
        return False
    if name.lower().endswith(IDENTIFIERS) or "url" in name.lower():
        return True
    paths = [image.get("path") if isinstance(image, dict) else image for image in images]
    return os.path.basename(value) in {os.path.basename(path) for path in paths if isinstance(path, str)}


def suggest_columns(values: dict) -> str:
    """Return a sentence with the column mapping that would make a row fit a format, or an empty text."""
    image = next((name for name, value in values.items() if looks_like_image(value)), None)
    texts = [
        name for name, value in values.items() if name != image and isinstance(value, str) and len(value) < 10_000
    ]

    def best(names: tuple[str, ...]) -> str | None:
        return next((text for name in names for text in texts if name in text.lower()), None)

    question = best(QUESTION_NAMES) or next((name for name in texts if values[name].strip().endswith("?")), None)
    texts = [name for name in texts if name != question]
    answer = best(ANSWER_NAMES)
    mapping = {"image": image} if image else {}
    if question and (answer or len(texts) == 1):
        mapping |= {"question": question, "answer": answer or texts[0]}
    elif image and (best(CAPTION_NAMES) or len(texts) == 1):
        mapping["text"] = best(CAPTION_NAMES) or texts[0]
    else:
        return ""
    mapping = {target: source for target, source in mapping.items() if target != source}
    return f" This mapping may fit: {format_columns(mapping)}." if mapping else ""
