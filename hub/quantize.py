# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A VT-LMM with its decoder in 4 or 8 bits as a folder of its own, which `from_pretrained` alone loads."""

import logging
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration, VTLMMProcessor

from .convert import read_config_file


logger = logging.getLogger(__name__)

# Full names: the library matches against the whole path, and without a list it would round the tower and the VM head.
KEPT = ["model.vision_tower", "model.multi_modal_projector", "model.vm_head", "lm_head"]
QUANTIZATIONS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}


def write_quantized(folder: str | Path, output: str | Path, quantization: str) -> None:
    r"""
    Write the VT-LMM in `folder` with the decoder's projections in nf4 or int8 (bitsandbytes) and the rest (tower,
    projector, embeddings, both heads) in bfloat16. The folder says so itself: loading it needs bitsandbytes and no
    further argument. A processor is taken along.

    Args:
        folder (`str` or `Path`): a VT-LMM, not quantized.
        output (`str` or `Path`): folder for the result.
        quantization (`str`): `"nf4"` or `"int8"`.

    Raises:
        `ValueError`: when `folder` is no VT-LMM or is quantized already, and when bitsandbytes is not installed.
    """
    model_type = read_config_file(Path(folder)).get("model_type")
    if model_type != VTLMMConfig.model_type:
        raise ValueError(
            f"{folder}/config.json: `model_type` is {model_type!r}; only a VT-LMM goes into {quantization}."
        )
    config = BitsAndBytesConfig(**QUANTIZATIONS[quantization], llm_int8_skip_modules=KEPT)
    try:
        # Saved before anything is computed: on a CPU the first forward packs 4-bit weights anew, for itself.
        model = VTLMMForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    except ImportError as error:
        raise ValueError(f"{quantization} needs bitsandbytes: pip install 'vtlmm[qlora]'.") from error
    model.save_pretrained(output)
    if Path(folder, "processor_config.json").is_file():
        VTLMMProcessor.from_pretrained(folder).save_pretrained(output)
    logger.info("%s with its decoder in %s is in %s.", folder, quantization, output)
