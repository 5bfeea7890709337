# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Read JSON files whose content must have a certain type."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


NAMES = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}


def read_json(path: str | os.PathLike, kind: type = dict, entries: Mapping[str, type] | None = None) -> Any:
    r"""
    Return the content of a JSON file.

    Args:
        path (`str`): the file.
        kind (`type`, *optional*, defaults to `dict`): type of the content.
        entries (`dict[str, type]`, *optional*): entries that an object must have, with their types.

    Raises:
        `FileNotFoundError`: if the file does not exist.
        `ValueError`: if the file is not JSON, or its content or an entry has another type. The error names the file.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # also invalid UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    return require_type(value, kind, os.fspath(path), entries)


def require_type(
    value: Any, kind: type | tuple[type, ...], name: str, entries: Mapping[str, type] | None = None
) -> Any:
    """
    Return a JSON value after a check of its type.

    Args:
        name (`str`): the file, or the file and the line, for the error.

    Raises:
        `ValueError`: see [`read_json`].
    """
    if not isinstance(value, kind):
        expected = NAMES[kind[0] if isinstance(kind, tuple) else kind]
        raise ValueError(f"{name} must hold {expected}, not {describe_type(value)}.")
    content: Any = value  # `isinstance` above narrowed its type to object
    for key, entry in (entries or {}).items():
        if not isinstance(content.get(key), entry):
            actual = describe_type(content[key]) if key in content else "missing"
            raise ValueError(f"{name}: `{key}` must be {NAMES[entry]}, but is {actual}.")
    return value


def describe_type(value: Any) -> str:
    """Return the type of a JSON value in words."""
    return "null" if value is None else NAMES[type(value)]
