# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Convert rows to Arrow tables. A row in LLaVA's format is read by a shorter way, with the result of `convert_row`."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
from datasets import Features

from .formats import IMAGE_MARK, SURROGATE, convert_row
from .image_values import BASE64_START, PLAIN_PATH, is_image_text


# Roles that are kept, and their names in `messages`
PLAIN_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
# A longer path is checked by `read_image`
MAX_PLAIN_PATH = 255


def llava_row(row: Any) -> tuple[str | None, list[tuple[str, list[str | None]]]] | None:
    """
    Return the relative image path and the messages of a usual row in LLaVA's format, None for any other row.

    A message is its role and its parts: a text, or None for an image. The row has the columns `id`, `image` and
    `conversations` only, at most one image by a plain path, and valid texts. [`convert_row`] reads all other rows.
    """
    if type(row) is not dict or type(row.get("conversations")) is not list:
        return None
    image, identifier = row.get("image"), row.get("id")
    if len(row) != 1 + ("image" in row) + ("id" in row) or type(identifier) not in (int, str, type(None)):
        return None
    if image is None or image == "":
        image = None
        if is_image_text(identifier):
            return None
    elif type(image) is not str or not _is_plain(image):
        return None
    messages, num_marks = [], 0
    for turn in row["conversations"]:
        if type(turn) is not dict or len(turn) != 2:
            return None
        name, value = turn.get("from"), turn.get("value")
        if type(name) is not str or type(value) is not str:
            return None
        if not value or name not in PLAIN_ROLES or not (value.isascii() or SURROGATE.search(value) is None):
            return None
        parts: list[str | None] = [value]
        if "<image>" in value:
            parts = [None]
            for piece in IMAGE_MARK.split(value):
                parts += [piece, None] if piece else [None]
            parts = parts[1:-1]
            num_marks += parts.count(None)
        messages.append((PLAIN_ROLES[name], parts))
    if image is not None and not num_marks:
        if not messages or messages[0][0] != "user":
            return None
        messages[0] = "user", [None, *messages[0][1]]
    return (image, messages) if messages else None


def _is_plain(path: str) -> bool:
    """Return whether `read_image` only joins `path` to the folder."""
    is_short = os.sep == "/" and len(path) <= MAX_PLAIN_PATH and path.isascii()
    return is_short and bool(PLAIN_PATH.fullmatch(path)) and not (path.startswith("data:") or BASE64_START.match(path))


class RowColumns:
    """
    The columns of converted rows.

    Args:
        features (`Features`): of the rows.
        source (`str`), folder (`str`, *optional*), options (`dict`): see [`convert_row`].
    """

    def __init__(self, features: Features, source: str, folder: str | None, options: dict):
        self.schema = features.arrow_schema
        self.source, self.folder, self.options = source, folder, options
        self.is_plain = folder is not None and not options["columns"] and not options["keep_columns"]
        self.start = "" if folder is None else os.path.join(folder, "")
        self._clear()

    def _clear(self) -> None:
        self.roles: list[str | None] = []
        self.types: list[str | None] = []
        self.texts: list[str | None] = []
        self.paths: list[str | None] = []
        self.bytes: list[bytes | None] = []
        # The end of each message in the parts, and of each row in the messages and in the images
        self.part_ends, self.message_ends, self.image_ends = [0], [0], [0]
        self.others: dict[str, list] = {f.name: [] for f in self.schema if f.name not in ("messages", "images")}

    def __len__(self) -> int:
        return len(self.message_ends) - 1

    def add(self, row: Any, index: int) -> None:
        """Add a row of any supported format."""
        plain = llava_row(row) if self.is_plain else None
        if plain is None:
            for converted in convert_row(row, index, self.source, self.folder, **self.options):
                self._add_converted(converted)
            return
        image, messages = plain
        for role, parts in messages:
            self.roles.append(role)
            self.texts += parts
            self.types += ["text" if part is not None else "image" for part in parts]
            self.part_ends.append(len(self.texts))
        self.message_ends.append(len(self.roles))
        if image is not None:
            self.paths.append(self.start + image)
            self.bytes.append(None)
        self.image_ends.append(len(self.paths))
        self.others["num_context_messages"].append(0)

    def _add_converted(self, row: dict) -> None:
        for message in row["messages"]:
            self.roles.append(message["role"])
            self.types += [part["type"] for part in message["content"]]
            self.texts += [part["text"] for part in message["content"]]
            self.part_ends.append(len(self.texts))
        self.message_ends.append(len(self.roles))
        self.paths += [image["path"] for image in row["images"]]
        self.bytes += [image["bytes"] for image in row["images"]]
        self.image_ends.append(len(self.paths))
        for name, values in self.others.items():
            values.append(row[name])

    def table(self) -> pa.Table:
        """Return the added rows as a table and remove them."""
        messages = self.schema.field("messages").type
        message = messages.value_type
        content = message.field("content").type
        parts = _struct(content.value_type, {"type": self.types, "text": self.texts})
        contents = pa.ListArray.from_arrays(pa.array(self.part_ends, pa.int32()), parts, type=content)
        turns = _struct(message, {"role": self.roles, "content": contents})
        images = self.schema.field("images").type
        files = _struct(images.value_type, {"path": self.paths, "bytes": self.bytes})
        columns = {
            "messages": pa.ListArray.from_arrays(pa.array(self.message_ends, pa.int32()), turns, type=messages),
            "images": pa.ListArray.from_arrays(pa.array(self.image_ends, pa.int32()), files, type=images),
        }
        for name, values in self.others.items():
            columns[name] = pa.array(values, self.schema.field(name).type)
        table = pa.table([columns[name] for name in self.schema.names], schema=self.schema)
        self._clear()
        return table


def _struct(kind: pa.StructType, columns: dict[str, Any]) -> pa.StructArray:
    """Return a struct array from lists or arrays of its fields."""
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, field.type)
        for field, column in ((field, columns[field.name]) for field in kind)
    ]
    return pa.StructArray.from_arrays(arrays, fields=list(kind))


def row_tables(
    rows: Iterable[Any], features: Features, source: str, folder: str | None, options: dict, size: int
) -> Iterator[pa.Table]:
    """Yield converted rows as tables of about `size` rows."""
    columns = RowColumns(features, source, folder, options)
    for index, row in enumerate(rows):
        columns.add(row, index)
        if len(columns) >= size:
            yield columns.table()
    if len(columns):
        yield columns.table()
