# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Export vision tower, projector and VM head to ONNX: visual tokens of an image without torch."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor
from modeling_vtlmm.layers_vtlmm import zero_image

from .export_source import open_vtlmm
from .paths import check_output, draft_output


logger = logging.getLogger(__name__)

ONNX_FILE = "visual_tokens.onnx"


class VisualLogits(nn.Module):
    """The part of a VT-LMM that computes visual tokens: tower, projector and VM head."""

    def __init__(self, model: VTLMMForConditionalGeneration):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image features `(…, num_patches, hidden_size)` and logits `(…, num_patches, visual_vocab_size)`."""
        image_features = self.model.get_image_features(pixel_values).image_features
        return image_features, self.model.vm_head(image_features)


def export_onnx(model_path: str | Path, output_dir: str | Path, *, overwrite: bool = False) -> Path:
    r"""
    Write `visual_tokens.onnx` in float32, together with the processor's files.

    The input `pixel_values` is one image `(1, 3, height, width)`, as the image processor prepares it. The outputs are
    `image_features` `(1, num_patches, hidden_size)` and `visual_logits` `(1, num_patches, visual_vocab_size)`, whose
    softmax is the visual tokens. Weights above 1.5 GiB are in a second file, `visual_tokens.onnx.data`.

    Args:
        model_path (`str` or `Path`): folder or Hub id of a VT-LMM.
        output_dir (`str` or `Path`): folder for the files.
        overwrite (`bool`, *optional*, defaults to `False`): replace the model that `output_dir` contains.

    Returns:
        `Path`: the ONNX file.

    Raises:
        `FileExistsError`: if `output_dir` contains files and `overwrite` is not set.
        `ValueError`: if the model is not a VT-LMM, or the packages onnx and onnxscript are not installed.
    """
    if find_spec("onnxscript") is None or find_spec("onnx") is None:
        raise ValueError("ONNX files need the packages onnx and onnxscript: pip install 'vtlmm[onnx]'.")
    output = check_output(output_dir, [model_path], overwrite)
    folder = open_vtlmm(model_path).folder
    model: Any = VTLMMForConditionalGeneration.from_pretrained(folder, dtype="auto")
    exported = VisualLogits(model).eval()
    for part in (model.model.vision_tower, model.model.multi_modal_projector, model.model.vm_head):
        part.float()
    example = zero_image(model.config.vision_config, "cpu")
    with torch.no_grad():
        program: Any = torch.onnx.export(
            exported,
            (example,),
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["image_features", "visual_logits"],
            verbose=False,
        )
    with draft_output(output) as draft:
        program.save(draft / ONNX_FILE)  # the graph contains the name of the file with the weights
        if (folder / "processor_config.json").is_file():
            processor: Any = VTLMMProcessor.from_pretrained(folder)
            processor.tokenizer.save_pretrained(draft)
            processor.image_processor.save_pretrained(draft)
    logger.info("Exported tower, projector and VM head of %s to %s.", model_path, output / ONNX_FILE)
    return output / ONNX_FILE
