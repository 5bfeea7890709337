# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Merge an adapter into its base: a whole model that can be pushed, served, or trained in the next stage."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.utils.integrations import dequantize_module_weight
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor
from vtlmm.data.output_files import write_json
from vtlmm.hub.paths import check_output, clear_output
from vtlmm.hub.quantize import quantization_config
from vtlmm.hub.repository import RUN_RECORD, adapter_record
from vtlmm.inference.loading import read_adapter_settings, require_fit

from .stage_runner import change_model
from .stages import module_of


logger = logging.getLogger("vtlmm.train.merge")


def merge_adapter(
    adapter: str | Path,
    output: str | Path | None = None,
    *,
    base: str | Path | None = None,
    dequantize: bool = False,
    dtype: str | torch.dtype = "float32",
    overwrite: bool = False,
) -> VTLMMForConditionalGeneration:
    r"""
    Return the model that `vtlmm train` made with an adapter as one whole model. The merge is computed in float32.

    A QLoRA adapter was trained against the quantized weights, so merging into full precision shifts the outputs
    slightly. With `dequantize` the base is rounded as in training and the outputs are equal. (They differ slightly
    with int8, which also rounds activations on a GPU.)

    Args:
        adapter (`str` or `Path`): folder that `vtlmm train` wrote.
        output (`str` or `Path`, *optional*): folder for a complete Hub repository.
        base (`str` or `Path`, *optional*): folder or Hub id of the base; by default the base that the adapter names.
        dequantize (`bool`, *optional*, defaults to `False`): round the base as in training.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`): type of the result. bfloat16 halves the
            size of the folder and rounds small updates away.
        overwrite (`bool`, *optional*, defaults to `False`): replace the model in `output`.

    Raises:
        `ValueError`: if the adapter does not fit the base, if it does not change a weight that it should change, if
            the base was not quantized in training (with `dequantize`), and if `output` is or contains an input.
        `FileExistsError`: if `output` is not empty, without `overwrite`.
        `FileNotFoundError`: if the folder does not hold an adapter, or the base does not exist.
    """
    adapter = Path(adapter)
    if not adapter.is_dir() or find_adapter_config_file(str(adapter)) is None:
        raise FileNotFoundError(f"{adapter} does not hold an adapter (adapter_config.json). Name its folder.")
    config = PeftConfig.from_pretrained(str(adapter))
    revision = config.revision if base is None else None
    base = str(base or config.base_model_name_or_path)
    if output is not None:
        check_output(output, (adapter, base), overwrite)
    settings, quantization = _recorded_settings(adapter, dequantize)
    try:
        model = VTLMMForConditionalGeneration.from_pretrained(base, revision=revision, dtype=torch.float32)
    except OSError as error:
        raise FileNotFoundError(
            f"The base {base} of {adapter} does not exist. Set its place with `--base`."
        ) from error
    changed = read_adapter_settings(adapter)
    if changed.get("vm_head_type") == model.config.vm_head_type:
        changed["vm_head_type"] = None  # the base has this VM head already
    change_model(model, changed.get("use_pseudo_image_features"), changed.get("vm_head_type"), seed=0)
    if dequantize:
        round_weights(model, base, revision, quantization, settings.get("dtype", "float32"))
    merged = merge_into(model, adapter)
    cast(Any, merged).to(dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    if output is not None:
        _save(merged, Path(output), adapter)
        logger.info("Merged %s into %s; saved to %s.", adapter, base, output)
    return merged


def _recorded_settings(adapter: Path, dequantize: bool) -> tuple[dict[str, Any], str]:
    """Return the settings of the run that trained an adapter, empty without a record, and its quantization."""
    history = adapter_record(adapter)
    settings = history[-1]["settings"] if history else {}
    quantization = "nf4" if settings.get("load_in_4bit") else "int8" if settings.get("load_in_8bit") else "none"
    if dequantize and quantization == "none":
        raise ValueError(
            f"The run record of {adapter} does not say that the base was quantized in training. Remove "
            "`--dequantize`, or merge the folder that the finished run wrote."
        )
    if quantization != "none" and not dequantize:
        logger.info("The adapter was trained on a %s base. Without --dequantize outputs shift slightly.", quantization)
    return settings, quantization


def _save(model: PreTrainedModel, output: Path, adapter: Path) -> None:
    """Write a complete Hub repository: weights, code, processor and the record of the run."""
    processor = VTLMMProcessor.from_pretrained(adapter)
    clear_output(output)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    history = adapter_record(adapter)
    if history:
        write_json(output / RUN_RECORD, history)


@torch.no_grad()
def round_weights(model: PreTrainedModel, base: str, revision: str | None, quantization: str, dtype: str) -> None:
    """Round the decoder's weights of `model` as loading `base` in `dtype` with `quantization` does."""
    config = quantization_config(quantization, torch.float32)
    load = cast(Any, type(model)).from_pretrained  # `revision` may be None
    quantized = load(base, revision=revision, dtype=dtype, quantization_config=config)
    for name, module in quantized.named_modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ in ("Params4bit", "Int8Params"):
            cast(torch.Tensor, model.get_submodule(name).weight).copy_(dequantize_module_weight(module))


@torch.no_grad()
def merge_into(model: VTLMMForConditionalGeneration, adapter: str | Path) -> VTLMMForConditionalGeneration:
    """
    Return `model` with the adapter in its weights.

    Raises:
        `ValueError`: naming the weights that should have changed and did not.
    """

    def sums():
        return {name: row_sums(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}

    before, base = sums(), model.name_or_path
    adapted = PeftModel.from_pretrained(model, str(adapter))
    names = require_fit(adapted, adapter)
    model = cast(Any, adapted).merge_and_unload(safe_merge=True)
    after = sums()
    moved: dict[str | None, bool] = {}
    for name in names:
        # base_model.model.….q_proj.lora_A.weight belongs to ….q_proj.weight. A module that is saved in full is
        # compared as a whole: the first layer of a VM head's residual_block has no gradient while the last is zero.
        weight, *lora = name.removeprefix("base_model.model.").split(".lora_")
        weight = f"{weight}.weight" if lora else weight
        part = weight if lora else module_of(weight)
        moved[part] = moved.get(part, False) or not torch.equal(before[weight], after[weight])
    still = sorted(str(part) for part in moved if not moved[part])
    if still:
        raise ValueError(
            f"{len(still)} of {len(moved)} parts of the adapter {adapter} do not change the base {base}, e.g. "
            f"{', '.join(still[:3])}. The adapter was not trained, or it is merged into this base already."
        )
    return model


def row_sums(weight: torch.Tensor) -> torch.Tensor:
    """Return a small checksum of a matrix. In float64 it shows one weight that changes by one float32 step."""
    return weight.double().sum(-1)
