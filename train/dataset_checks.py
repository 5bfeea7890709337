# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Check the datasets of a recipe. The check of a local VT-LMM's data imports neither torch nor TRL."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from vtlmm.data.data_report import DataReport
from vtlmm.data.encoding import position_limit
from vtlmm.data.text_processor import load_text_processor
from vtlmm.data.validation import check_rows

from .dataset_config import MAX_LENGTH, DatasetConfig
from .stage_settings import split_stages


def load_processor(name: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[Any, int | None]:
    """Return the processor of a model, and the position limit of its decoder."""
    from transformers import AutoConfig, AutoProcessor

    load: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    limit = position_limit(AutoConfig.from_pretrained(name, **load))
    return AutoProcessor.from_pretrained(name, **load), limit


def check_data(settings: dict[str, Any]) -> Iterator[tuple[str, DataReport]]:
    """
    Check the rows and images of a recipe, without its other settings. Each stage may have other data.

    Args:
        settings (`dict`): settings of [`DatasetConfig`], `model_name_or_path`, `model_revision`, `trust_remote_code`,
            `max_length` and `stages`.

    Yields:
        `tuple[str, DataReport]`: the split (`"train"` or `"eval"`) and its report; equal settings are checked once.

    Raises:
        `ValueError`: if `model_name_or_path` is not set.
    """
    if "model_name_or_path" not in settings:
        raise ValueError("The model is missing: its processor counts the tokens. Pass --model or a recipe.")
    name, trust_remote_code = settings["model_name_or_path"], settings.get("trust_remote_code", False)
    loaded: tuple[Any, int | None] | None = load_text_processor(name)
    if loaded is None:
        import modeling_vtlmm  # noqa: F401 - registers the processor

        loaded = load_processor(name, settings.get("model_revision"), trust_remote_code)
    processor, max_positions = loaded
    checked = []
    for run in split_stages(settings):
        data = DatasetConfig(**{f.name: run[f.name] for f in fields(DatasetConfig) if f.name in run})
        max_length = run.get("max_length", MAX_LENGTH)
        if (data, max_length) in checked:
            continue
        checked.append((data, max_length))
        for split in ("train", "eval"):
            parts = data.parts(split)
            for name, part, _ in parts:
                rows = part.load(split)
                if rows is not None:
                    report = check_rows(rows, processor, max_length, max_positions=max_positions)
                    yield split if len(parts) == 1 else f"{split}, {name}", report
