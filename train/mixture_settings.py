# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Read the entries of `dataset_name` if it is a list: a mixture of datasets."""

from pathlib import Path
from typing import Any

from .setting_types import suggest


# Key of an entry of a mixture: the setting that it replaces
MIXTURE_KEYS = {
    "name": "dataset_name",
    "config": "dataset_config",
    "split": "dataset_train_split",
    "test_split": "dataset_test_split",
    "image_folder": "image_folder",
    "columns": "columns",
    "max_rows": "max_rows",
    "weight": "weight",
}


def mixture_entries(names: list) -> list[dict[str, Any]]:
    """
    Return the entries of a mixture as mappings.

    Raises:
        `ValueError`: if an entry has no name or an unknown key.
    """
    entries = [dict(entry) if isinstance(entry, dict) else {"name": entry} for entry in names]
    for number, entry in enumerate(entries):
        if not isinstance(entry.get("name"), str):
            raise ValueError(f"`dataset_name[{number}]` has no `name`. Write a file, a folder or a Hub dataset id.")
        for key in entry.keys() - MIXTURE_KEYS.keys():
            raise ValueError(f"`dataset_name[{number}]` has an unknown key {key!r}.{suggest(str(key), MIXTURE_KEYS)}")
    return entries


def part_names(names: list[str]) -> list[str]:
    """Return a short name for each dataset of a mixture: the file or the last part of the id, numbered if repeated."""
    short = [Path(name).stem for name in names]
    return [name if short.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(short)]
