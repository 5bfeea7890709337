# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Load the model that the shared options describe."""

from typing import Any


def load(name: str, **options: Any) -> Any:
    """Load the model and processor of a folder or Hub id, see [`load_model`]."""
    from vtlmm.inference.loading import load_model

    return load_model(name, **options)


def require_vtlmm(name: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
    from vtlmm.inference.loading import load_config, require_visual_tokens

    require_visual_tokens(load_config(name, revision, trust_remote_code), name)
