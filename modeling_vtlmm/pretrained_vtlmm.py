# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Base class of the VT-LMM models: loading, saving, initialization and supported features."""

import copy
from functools import partialmethod
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers import initialization as init

from .configuration_vtlmm import VTLMMConfig
from .layers_vtlmm import VTLMMZeroLinear, require_input_gradient


# bitsandbytes matches these names against full module paths, so a bare "vision_tower" would match nothing.
UNQUANTIZED_MODULES = ("model.vision_tower", "model.multi_modal_projector", "model.vm_head", "lm_head")


class VTLMMPreTrainedModel(PreTrainedModel):
    config: VTLMMConfig
    config_class = VTLMMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # as in transformers' llava
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The default of transformers is 50 GB, but the Hub recommends shards of 5 GB.
    save_pretrained = partialmethod(PreTrainedModel.save_pretrained, max_shard_size="5GB")
    push_to_hub: Any = partialmethod(PreTrainedModel.push_to_hub, max_shard_size="5GB")

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, VTLMMZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def enable_input_require_grads(self):
        """Make the decoder's input embeddings require a gradient in each forward pass that trains the decoder."""
        self.disable_input_require_grads()
        decoder = self.base_model.language_model
        self._require_grads_hooks = [decoder.register_forward_pre_hook(require_input_gradient, with_kwargs=True)]

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """Set the attention implementation as the base class does. A convolutional vision tower has no attention."""
        if self.config.is_convolutional:
            if isinstance(attn_implementation, str):
                attn_implementation = {"": attn_implementation, "text_config": attn_implementation}
            attn_implementation = {**attn_implementation, "vision_config": "eager"}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs):
        """Resize the vocabulary as the base class does. A smaller vocabulary truncates the VM head too."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.visual_vocab_size = self.base_model.vm_head.truncate_vocabulary(self.config.text_config.vocab_size)
        return embeddings

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        Load a model as the base class does. Missing tensors are an error unless `output_loading_info` is set.

        By default, bitsandbytes quantizes the decoder only (see `UNQUANTIZED_MODULES`).

        Raises:
            `ValueError`: if the checkpoint has missing tensors, which would be random, and `output_loading_info` is
                not set.
        """
        quantization = kwargs.get("quantization_config")
        if isinstance(quantization, BitsAndBytesConfig) and quantization.llm_int8_skip_modules is None:
            quantization = copy.copy(quantization)
            quantization.llm_int8_skip_modules = [*UNQUANTIZED_MODULES]
            kwargs["quantization_config"] = quantization
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if output_loading_info:
            return model, info
        if info["missing_keys"] and pretrained_model_name_or_path is not None:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"{len(missing)} tensors of {cls.__name__} are missing in {str(pretrained_model_name_or_path)!r}, "
                f"e.g. {', '.join(missing[:3])}. Use a complete VT-LMM checkpoint from `vtlmm compose` or "
                "`vtlmm convert`."
            )
        return model
