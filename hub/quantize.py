# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Write a VT-LMM with a quantized decoder (4 or 8 bits) as a folder that `from_pretrained` loads."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration, VTLMMProcessor
from modeling_vtlmm.pretrained_vtlmm import UNQUANTIZED_MODULES

from .source_formats import read_config_file


logger = logging.getLogger(__name__)

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def quantization_config(quantization: str, compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig | None:
    """
    Return the bitsandbytes config that quantizes the decoder only, or None for `"none"`.

    Args:
        quantization (`str`): `"none"`, `"nf4"` or `"int8"`.
        compute_dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): dtype of nf4's matrix products.

    Raises:
        `ValueError`: if bitsandbytes is not installed.
    """
    if quantization == "none":
        return None
    if not is_bitsandbytes_available():
        raise ValueError(f"{quantization} needs bitsandbytes: pip install 'vtlmm[qlora]'.")
    options = dict(QUANTIZATIONS[quantization])
    if quantization == "nf4":
        options["bnb_4bit_compute_dtype"] = compute_dtype
    return BitsAndBytesConfig(**options, llm_int8_skip_modules=[*UNQUANTIZED_MODULES])


def write_quantized(folder: str | Path, output: str | Path, quantization: str) -> None:
    r"""
    Write the VT-LMM in `folder` with the decoder's projections in nf4 or int8 (bitsandbytes).

    Vision tower, projector, embeddings and both heads become bfloat16. The config stores the quantization, so loading
    needs bitsandbytes and no further argument. The processor is copied.

    Args:
        folder (`str` or `Path`): a VT-LMM, not quantized.
        output (`str` or `Path`): folder for the result.
        quantization (`str`): `"nf4"` or `"int8"`.

    Raises:
        `ValueError`: if `folder` is not a VT-LMM or is already quantized, or bitsandbytes is not installed.
    """
    model_type = read_config_file(Path(folder)).get("model_type")
    if model_type != VTLMMConfig.model_type:
        raise ValueError(
            f"{folder}/config.json: `model_type` is {model_type!r}; only a VT-LMM goes into {quantization}."
        )
    config = quantization_config(quantization)
    # Save before any forward pass: on a CPU the first one repacks the 4-bit weights.
    model = VTLMMForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(output)
    if Path(folder, "processor_config.json").is_file():
        VTLMMProcessor.from_pretrained(folder).save_pretrained(output)
    logger.info("%s with its decoder in %s is in %s.", folder, quantization, output)
