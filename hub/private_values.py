# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Remove secrets and local paths from what is published, and escape what a model card quotes."""

import html
import os
import re
from pathlib import Path
from typing import Any

from .repository import is_hub_id


SECRET_KEY = re.compile(r"token$|secret|password|passwd|api_?key|credential|authorization", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\bhf_[A-Za-z0-9_]{6,}|\bsk-[\w-]{12,}|\bghp_\w{12,}|://[^/\s:@]+:[^/\s@]+@")
# Names of runs and projects on trackers often name people or machines.
PRIVATE_KEYS = {"run_name", "project", "logging_dir", "trackio_space_id", "hub_model_id", "report_to", "push_to_hub"}


def remove_private_values(values: Any) -> Any:
    """
    Return a copy of JSON values without secrets, run names and local paths, at every depth.

    A dictionary entry with a private key, or with a value that looks like a secret, is removed. Of a local path the
    last part is kept.
    """
    if isinstance(values, dict):
        kept = {key: value for key, value in values.items() if not _is_private(str(key), value)}
        return {key: remove_private_values(value) for key, value in kept.items()}
    if isinstance(values, (list, tuple)):
        return [remove_private_values(value) for value in values if not _is_private("", value)]
    return published_name(values) if isinstance(values, str) else values


def _is_private(key: str, value: Any) -> bool:
    if key in PRIVATE_KEYS or SECRET_KEY.search(key):
        return True
    return isinstance(value, str) and SECRET_VALUE.search(value) is not None


def published_name(name: str | os.PathLike[str]) -> str:
    """Return a Hub id or plain text unchanged, and only the last part of a local path."""
    text = str(name)
    is_path = isinstance(name, os.PathLike) or text.startswith(("/", "./", "../", "~")) or "\\" in text
    is_path = is_path or ("/" in text and " " not in text and "://" not in text and not is_hub_id(text))
    return Path(text.replace("\\", "/")).name if is_path else text


def escape_cell(value: Any) -> str:
    """Return `value` as text for one cell of a Markdown table: one line, without Markdown or HTML."""
    text = " ".join(html.escape(str(value), quote=False).split())
    for character in "|`[]*":
        text = text.replace(character, f"&#{ord(character)};")
    return text


def escape_code(text: str) -> str:
    """Return `text` for a fenced code block, which it cannot end."""
    return text.replace("```", "'''")
