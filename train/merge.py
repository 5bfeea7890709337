# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""An adapter and its base as one whole model, which can be pushed, served, or trained in the next stage."""

import json
import logging
import shutil
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.utils.integrations import dequantize_module_weight
from transformers import PreTrainedModel

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor
from vtlmm.hub.quantize import quantization_config

from .adapters import require_fit
from .stage_runner import RUN_RECORD, change_model
from .stages import module_of


logger = logging.getLogger("vtlmm.train.merge")


def merge(
    adapter: str | Path,
    output: str | Path | None = None,
    *,
    base: str | Path | None = None,
    dequantize: bool = False,
    dtype: str | torch.dtype = "float32",
) -> VTLMMForConditionalGeneration:
    r"""
    The model that `vtlmm train` made with an adapter, as one whole model; computed in float32.

    An adapter on a quantized base learnt beside the rounding of that base: on the base in full precision the outputs
    are near those of the training, on the dequantized base (`dequantize`) they are the same. (Not quite with int8,
    which outside training on a CPU rounds activations too.)

    Args:
        adapter (`str` or `Path`): folder that `vtlmm train` wrote.
        output (`str` or `Path`, *optional*): folder for everything that a Hub repository has.
        base (`str` or `Path`, *optional*): folder or Hub id of the base; by default what the adapter names.
        dequantize (`bool`, *optional*, defaults to `False`): round the base as it was in training.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`): of the result. bfloat16 halves the folder
            and rounds away small steps of the training.

    Raises:
        `ValueError`: when the adapter does not fit the base, or leaves a weight that it should change as it was, and
        when the base was not quantized in training or is not found.
    """
    record = Path(adapter, RUN_RECORD)
    if not record.is_file():  # of a checkpoint: the finished run's, if it was finished
        record = Path(adapter).resolve().parent / RUN_RECORD
    history = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else [{"settings": {}}]
    settings = history[-1]["settings"]
    quantization = settings.get("quantization", "none")
    if dequantize and quantization == "none":
        raise ValueError(
            f"No {RUN_RECORD} of {adapter} says that the base was quantized in training: leave out `--dequantize`, or "
            "merge the folder that the finished run wrote."
        )
    if quantization != "none" and not dequantize:
        logger.info("The adapter was trained on a base in %s: outputs shift a little; --dequantize.", quantization)

    config = PeftConfig.from_pretrained(str(adapter))
    revision = config.revision if base is None else None
    base = str(base or config.base_model_name_or_path)
    try:
        model = VTLMMForConditionalGeneration.from_pretrained(base, revision=revision, dtype=torch.float32)
    except OSError as error:
        raise ValueError(f"The base {base} of {adapter} is not found: say where it is with `--base`.") from error
    if not record.is_file():
        logger.warning(
            "No %s of %s says what its run changed of the model: the VM head's type and what the decoder reads are "
            "taken from the base.",
            RUN_RECORD,
            adapter,
        )
    change_model(model, settings.get("use_pseudo_image_features"), settings.get("vm_head_type"), seed=0)
    if dequantize:
        round_weights(model, base, revision, quantization, settings.get("dtype", "float32"))
    model = merge_into(model, adapter).to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    if output is not None:
        model.save_pretrained(output)
        VTLMMProcessor.from_pretrained(adapter).save_pretrained(output)
        if record.is_file():
            shutil.copy(record, output)
        logger.info("Merged %s into %s; saved to %s.", adapter, base, output)
    return model


@torch.no_grad()
def round_weights(model: PreTrainedModel, base: str, revision: str | None, quantization: str, dtype: str) -> None:
    """The decoder's weights of `model` as they are when `base` is loaded in `dtype` and `quantization`."""
    config = quantization_config(quantization, torch.float32)
    quantized = type(model).from_pretrained(base, revision=revision, dtype=dtype, quantization_config=config)
    for name, module in quantized.named_modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ in ("Params4bit", "Int8Params"):
            model.get_submodule(name).weight.copy_(dequantize_module_weight(module))


@torch.no_grad()
def merge_into(model: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """
    `model` with the adapter in its weights.

    Raises:
        `ValueError`: naming the weights that should have moved and did not.
    """

    def sums():
        return {name: row_sums(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}

    before, base = sums(), model.name_or_path
    model = PeftModel.from_pretrained(model, str(adapter))
    names = require_fit(model, adapter)
    model = model.merge_and_unload(safe_merge=True)
    after = sums()
    moved = {}
    for name in names:
        # base_model.model.….q_proj.lora_A.weight belongs to ….q_proj.weight; what is saved in full has its own name
        # and moves as a module: the first layer of a VM head's residual_block rests until the last one has left zero
        weight, *lora = name.removeprefix("base_model.model.").split(".lora_")
        weight = f"{weight}.weight" if lora else weight
        part = weight if lora else module_of(weight)
        moved[part] = moved.get(part, False) or not torch.equal(before[weight], after[weight])
    still = sorted(part for part in moved if not moved[part])
    if still:
        raise ValueError(
            f"Of {len(moved)} parts of the adapter {adapter} {len(still)} leave the base {base} as it is, e.g. "
            f"{', '.join(still[:3])}: the adapter was not trained, or this base has it already."
        )
    return model


def row_sums(weight: torch.Tensor) -> torch.Tensor:
    """Whether a matrix has changed, without a copy of it: float64 shows one weight that moves by one float32 step."""
    return weight.double().sum(-1)
