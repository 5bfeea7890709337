# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""VT-LMM: a LLaVA-style model that also learns to predict what is in each image patch.

The public names are imported when they are first used, so that `import vtlmm` imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration, VTLMMProcessor
    from vtlmm.analysis.dataset_analysis import analyze
    from vtlmm.data.rows import load_rows
    from vtlmm.data.validation import check_rows
    from vtlmm.evaluation.runner import evaluate
    from vtlmm.hub.compose import compose_model
    from vtlmm.hub.convert import convert_checkpoint
    from vtlmm.hub.push import push_model
    from vtlmm.hub.verify import verify_checkpoint
    from vtlmm.inference.generation import generate
    from vtlmm.inference.loading import load_model
    from vtlmm.train.caption_alignment import align_captions
    from vtlmm.train.config import VTLMMTrainingConfig
    from vtlmm.train.merge import merge_adapter
    from vtlmm.train.trainer import VTLMMTrainer

__version__ = "0.2.0.dev0"

# Public name -> module that defines it
_MODULES = {
    "VTLMMConfig": "modeling_vtlmm",
    "VTLMMProcessor": "modeling_vtlmm",
    "VTLMMForConditionalGeneration": "modeling_vtlmm",
    "VTLMMTrainer": "vtlmm.train.trainer",
    "VTLMMTrainingConfig": "vtlmm.train.config",
    "load_rows": "vtlmm.data.rows",
    "check_rows": "vtlmm.data.validation",
    "compose_model": "vtlmm.hub.compose",
    "convert_checkpoint": "vtlmm.hub.convert",
    "merge_adapter": "vtlmm.train.merge",
    "load_model": "vtlmm.inference.loading",
    "generate": "vtlmm.inference.generation",
    "evaluate": "vtlmm.evaluation.runner",
    "analyze": "vtlmm.analysis.dataset_analysis",
    "align_captions": "vtlmm.train.caption_alignment",
    "verify_checkpoint": "vtlmm.hub.verify",
    "push_model": "vtlmm.hub.push",
}

__all__ = [
    "VTLMMConfig",
    "VTLMMForConditionalGeneration",
    "VTLMMProcessor",
    "VTLMMTrainer",
    "VTLMMTrainingConfig",
    "__version__",
    "align_captions",
    "analyze",
    "check_rows",
    "compose_model",
    "convert_checkpoint",
    "evaluate",
    "generate",
    "load_model",
    "load_rows",
    "merge_adapter",
    "push_model",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vtlmm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
