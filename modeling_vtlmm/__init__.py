# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Register VT-LMM's local classes with the Auto classes of transformers.

The other files of this folder are copied to Hub repositories. This file is not.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_vtlmm import VTLMMConfig
from .modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMModel, VTLMMPreTrainedModel
from .processing_vtlmm import VTLMMProcessor


AutoConfig.register("vtlmm", VTLMMConfig)
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(VTLMMConfig, VTLMMForConditionalGeneration)
AutoProcessor.register(VTLMMConfig, VTLMMProcessor)

# With this registration, `save_pretrained` copies the code files to the folder of the weights.
VTLMMConfig.register_for_auto_class()
VTLMMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
VTLMMProcessor.register_for_auto_class()

__all__ = ["VTLMMConfig", "VTLMMForConditionalGeneration", "VTLMMModel", "VTLMMPreTrainedModel", "VTLMMProcessor"]
