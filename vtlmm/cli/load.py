# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Load the model that the shared options describe."""

from typing import Any


def load(
    name: str,
    *,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    device_map: str | None = None,
    use_pseudo_image_features: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    import torch
    from transformers import AutoConfig

    from vtlmm.inference import loading  # registers the model

    remote = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name, **remote)
    settings = {"config": config}
    if use_pseudo_image_features:
        if config.model_type != "vtlmm":
            raise ValueError(f"{name} is a {config.model_type}: only a VT-LMM has pseudo image features.")
        config.use_pseudo_image_features = True
    if device_map:
        settings["device_map"] = device_map
    if load_in_4bit or load_in_8bit:
        from vtlmm.hub.quantize import quantization_config

        weights = config.dtype if dtype == "auto" else getattr(torch, dtype)
        settings["quantization_config"] = quantization_config(
            "nf4" if load_in_4bit else "int8", weights or torch.float32
        )
    return loading.load_model(name, dtype, **remote, **settings)


def require_vtlmm(name: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
    from transformers import AutoConfig

    import modeling_vtlmm  # noqa: F401 - registers the model

    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if config.model_type != "vtlmm":
        raise ValueError(f"{name} is a {config.model_type}: only a VT-LMM has visual tokens.")
