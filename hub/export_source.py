# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Open a VT-LMM for an export to another format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_vtlmm import VTLMMConfig

from .checkpoint_files import CHECKPOINT_FILES, StoredTensor, check_tensors, list_tensors, model_without_weights
from .paths import local_folder
from .source_formats import read_config_file


@dataclass
class ExportSource:
    """
    A checked VT-LMM whose weights are not read yet.

    folder (`Path`), config ([`VTLMMConfig`]), model ([`VTLMMForConditionalGeneration`] on the meta device).
    """

    folder: Path
    config: Any
    model: Any

    def list_tensors(self) -> dict[str, StoredTensor]:
        """
        Return all tensors by their names.

        Raises:
            `ValueError`: if tensors are missing, unexpected or of another shape; all are named.
        """
        tensors = list_tensors(self.folder)
        check_tensors(tensors, self.model, self.folder)
        return tensors


def open_vtlmm(checkpoint: str | Path) -> ExportSource:
    """
    Return the VT-LMM `checkpoint`, a folder or a Hub id.

    Raises:
        `FileNotFoundError`: if `checkpoint` is a path that does not exist.
        `ValueError`: if it is not a VT-LMM: another model, an adapter or a quantized model.
    """
    folder = local_folder(checkpoint, patterns=CHECKPOINT_FILES)
    model_type = read_config_file(folder).get("model_type")
    if model_type != VTLMMConfig.model_type:
        raise ValueError(f"{folder}/config.json: `model_type` is {model_type!r}; only a VT-LMM can be exported.")
    config: Any = VTLMMConfig.from_pretrained(folder)
    return ExportSource(folder, config, model_without_weights(config))
