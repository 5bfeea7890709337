# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Load a model and its processor for inference."""

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_vtlmm  # noqa: F401 - registers the model


def load_model(
    name: str, dtype: str = "auto", revision: str | None = None, trust_remote_code: bool = False, **settings
):
    """
    The VT-LMM, or the native twin, of a folder or Hub id, in evaluation mode, and its processor; on the accelerator if
    there is one. A checkpoint that lacks a tensor is refused.

    Args:
        settings: further ones of `from_pretrained`.
    """
    load = {"revision": revision, "trust_remote_code": trust_remote_code}
    processor = AutoProcessor.from_pretrained(name, **load)
    settings = {"device_map": {"": best_device()}} | settings
    model, info = AutoModelForImageTextToText.from_pretrained(
        name, dtype=dtype, output_loading_info=True, **load, **settings
    )
    missing = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
    if missing:  # a native twin would answer, with random numbers there
        raise ValueError(
            f"{name} lacks {len(missing)} tensors of {type(model).__name__}, e.g. {', '.join(missing[:3])}. Answers "
            "would be those of random weights: convert or save it again."
        )
    return model.eval(), processor


def best_device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
