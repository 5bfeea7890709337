# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""VT-LMM for the Auto classes: importing this package makes them know the local classes.

Every other file of this folder is what a Hub repository receives; this one is not shipped.
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

# Saving then copies the code files beside the weights.
VTLMMConfig.register_for_auto_class()
VTLMMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
VTLMMProcessor.register_for_auto_class()

__all__ = ["VTLMMConfig", "VTLMMForConditionalGeneration", "VTLMMModel", "VTLMMPreTrainedModel", "VTLMMProcessor"]
