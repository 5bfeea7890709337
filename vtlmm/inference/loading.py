# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Load a model and its processor for inference: from a folder, a Hub repository, or an adapter."""

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file, find_adapter_config_file

import modeling_vtlmm  # noqa: F401 - registers the model
from vtlmm.data.json_files import read_json
from vtlmm.hub.paths import check_checkpoint
from vtlmm.hub.repository import ADAPTER_SETTINGS
from vtlmm.hub.repository_checks import require_json


logger = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A model in evaluation mode and its processor."""

    model: PreTrainedModel
    processor: ProcessorMixin


class _Source(NamedTuple):
    """Where the weights are: `base` and `revision` for `from_pretrained`, `adapter` for PEFT, and the config."""

    config: PreTrainedConfig
    base: str
    revision: str | None
    adapter: str | None


def load_model(
    name: str | os.PathLike,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    use_pseudo_image_features: bool = False,
    **kwargs,
) -> LoadedModel:
    r"""
    Load a VT-LMM, a LLaVA exported from it, or an adapter of `vtlmm train` with its base model.

    An adapter is merged into its base, unless the base is quantized. The base comes from `adapter_config.json`, the
    type of the VM head and the use of pseudo image features from `vtlmm_adapter.json`.

    Args:
        name (`str`): model folder, adapter folder or Hub id.
        dtype (`str` or `torch.dtype`, *optional*): dtype of the weights; `"auto"` is the checkpoint's dtype.
        revision (`str`, *optional*): branch, tag or commit of a Hub id.
        trust_remote_code (`bool`, *optional*, defaults to `False`): allow code in the model's folder to run.
        device_map (`str` or `dict`, *optional*): as in transformers; by default the first accelerator or the CPU.
        load_in_4bit, load_in_8bit (`bool`, *optional*, defaults to `False`): quantize only the decoder (nf4 or int8).
        use_pseudo_image_features (`bool`, *optional*, defaults to `False`): give the decoder softmax(VM head(v)) E
            instead of the image features v.
        kwargs: further arguments of `from_pretrained`.

    Returns:
        [`LoadedModel`]: a named tuple `(model, processor)`.

    Raises:
        `FileNotFoundError`: if `name` looks like a path and the folder does not exist.
        `ValueError`, `NotADirectoryError`: if `name` is not a model, tensors are missing, or the adapter does not fit.
    """
    source = _find_source(name, revision, trust_remote_code)
    name, config, remote = os.fspath(name), source.config, {"trust_remote_code": trust_remote_code}
    if use_pseudo_image_features:
        require_visual_tokens(config, name)
        config.use_pseudo_image_features = True
    if load_in_4bit or load_in_8bit:
        kwargs["quantization_config"] = _quantization_config(config, dtype, load_in_4bit, load_in_8bit)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        source.base,
        config=config,
        dtype=dtype,
        revision=source.revision,
        device_map=device_map or {"": best_device()},
        output_loading_info=True,
        **remote,
        **kwargs,
    )
    model, info = loaded
    missing = {*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])}
    if source.adapter is not None:
        model, in_adapter = _apply_adapter(model, source.adapter, revision)
        missing -= in_adapter
    _check_complete(source.base, type(model).__name__, missing)
    return LoadedModel(model.eval(), AutoProcessor.from_pretrained(name, revision=revision, **remote))


def _check_complete(name: str, model_class: str, missing: set[str]) -> None:
    """Reject missing tensors. from_pretrained only warns for LLaVA, and the answers would come from random weights."""
    if missing:
        raise ValueError(
            f"{name} has {len(missing)} missing tensors of {model_class}, e.g. {', '.join(sorted(missing)[:3])}. "
            "Convert or save the model again."
        )


def load_config(name: str | os.PathLike, revision: str | None = None, trust_remote_code: bool = False):
    """Return the config of the model that [`load_model`] would load, and raise the same errors for a wrong name."""
    return _find_source(name, revision, trust_remote_code).config


def require_visual_tokens(config: PreTrainedConfig, name: str) -> None:
    """
    Check that a model has a VM head.

    Raises:
        `ValueError`: if the config is not of a VT-LMM, e.g. of an exported LLaVA.
    """
    if config.model_type != "vtlmm":
        raise ValueError(
            f"{name} is a {config.model_type} model without a VM head. Visual tokens and pseudo image features need a "
            "VT-LMM checkpoint."
        )


def best_device() -> str:
    """Return the type of the accelerator, or `"cpu"`."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


# ---- Where the weights are ----


def _find_source(name: str | os.PathLike, revision: str | None, trust_remote_code: bool) -> _Source:
    name = _check_name(name)
    adapter_config = find_adapter_config_file(name, revision=revision)
    if adapter_config is None:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        return _Source(config, name, revision, None)
    settings = read_json(adapter_config)
    base, base_revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base:
        raise ValueError(f"{name}/adapter_config.json does not name its base model (`base_model_name_or_path`).")
    try:
        _check_name(base)
        config = AutoConfig.from_pretrained(base, revision=base_revision, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"{name} is an adapter, and its base model {base!r} was not found. Name its base: "
            f"vtlmm merge {name} --base BASE --output FOLDER."
        ) from error
    for key, value in read_adapter_settings(name, revision).items():
        setattr(config, key, value)
    return _Source(config, base, base_revision, name)


def _check_name(name: str | os.PathLike) -> str:
    """
    Check a model's name before it is looked up on the Hub, which takes many retries, and return it as a text.

    Raises:
        `FileNotFoundError`, `NotADirectoryError`: see [`check_checkpoint`].
        `ValueError`: if it is a folder without a model.
    """
    text = check_checkpoint(name if isinstance(name, str) else Path(name))
    path = Path(text)
    if path.is_dir() and not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        inside = sorted(str(file.parent) for file in path.glob("*/config.json"))
        advice = f"Did you mean {' or '.join(inside[:5])}?" if inside else "Give the folder of a model."
        raise ValueError(f"{text} has no config.json and no adapter_config.json. {advice}")
    require_json(path)
    return text


def _quantization_config(config: PreTrainedConfig, dtype: str | torch.dtype, in_4bit: bool, in_8bit: bool):
    from vtlmm.hub.quantize import quantization_config  # imports the converters

    if in_4bit and in_8bit:
        raise ValueError("Set only one of load_in_4bit and load_in_8bit.")
    compute_dtype = config.dtype if dtype == "auto" else dtype
    if isinstance(compute_dtype, str):
        compute_dtype = getattr(torch, compute_dtype)
    return quantization_config("nf4" if in_4bit else "int8", compute_dtype or torch.float32)


# ---- Adapters ----


def read_adapter_settings(name: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """
    Return `use_pseudo_image_features` and `vm_head_type` of the model that an adapter was trained in.

    PEFT's own config has no place for them. The result is empty for an adapter that [`VTLMMTrainer`] did not save.

    Raises:
        `ValueError`: if the file is damaged.
    """
    path = cached_file(
        os.fspath(name),
        ADAPTER_SETTINGS,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        logger.warning(
            "%s has no %s. The type of the VM head and the use of pseudo image features come from the base model.",
            name,
            ADAPTER_SETTINGS,
        )
        return {}
    settings = read_json(path, entries={"use_pseudo_image_features": bool, "vm_head_type": str})
    return {key: settings[key] for key in ("use_pseudo_image_features", "vm_head_type")}


def _apply_adapter(model: PreTrainedModel, folder: str, revision: str | None) -> tuple[Any, set[str]]:
    """Return the model with the adapter's weights, and the names of the tensors that the adapter holds in full."""
    from peft import PeftModel

    quantized = getattr(model, "is_quantized", False)
    adapted = PeftModel.from_pretrained(model, folder, revision=revision)
    names = require_fit(adapted, folder, revision)
    in_full = {name.removeprefix("base_model.model.") for name in names if ".lora_" not in name}
    # A quantized base is not merged: merging would round the adapter's weights to 4 or 8 bits
    return (adapted.get_base_model() if quantized else adapted.merge_and_unload()), in_full


def require_fit(model, folder: str | os.PathLike, revision: str | None = None) -> list[str]:
    """
    Return the names of the adapter's tensors in `folder`. PEFT only warns if they do not fit the model.

    Raises:
        `ValueError`: if tensors of `model`'s adapter are missing in the folder, or the folder has others.
    """
    from peft import get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    saved = load_peft_weights(str(folder), device="cpu", revision=revision).keys()
    expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if saved != expected:
        raise ValueError(
            f"The adapter in {folder} does not fit the model: missing {sorted(expected - saved)[:5]}, unexpected "
            f"{sorted(saved - expected)[:5]}. Use the base model and the settings of its training."
        )
    return sorted(saved)
