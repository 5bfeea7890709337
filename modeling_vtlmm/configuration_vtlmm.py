# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Configuration of VT-LMM (arXiv 2403.07720)."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


# The `auto_map` of a Hub repository. AutoModel maps to the full model, because users who load a remote-code
# vision-language model with AutoModel expect `generate`.
AUTO_MAP = {
    "AutoConfig": "configuration_vtlmm.VTLMMConfig",
    "AutoModel": "modeling_vtlmm.VTLMMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_vtlmm.VTLMMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_vtlmm.VTLMMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_vtlmm.VTLMMForConditionalGeneration",
    "AutoProcessor": "processing_vtlmm.VTLMMProcessor",
}


class VTLMMConfig(PreTrainedConfig):
    r"""
    Configuration of a [`VTLMMForConditionalGeneration`]: a vision tower, a projector, a causal decoder and a VM head.

    The arguments have the same names as in transformers' `LlavaConfig`. The arguments that `LlavaConfig` does not have
    come last.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a CLIP ViT-L/14 at 336 pixels):
            The vision tower: a ViT (CLIP, SigLIP, DINOv2, …) or a convolutional network (MobileNetV2, ConvNeXt, …).
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to a Llama of the 7B shape):
            The decoder.
        image_token_id (`int`, *optional*, defaults to 32000):
            Id of the image token, the placeholder for one image feature in `input_ids`. It may be outside
            the decoder's vocabulary. The image token then has no embedding and no logit.
        image_seq_length (`int`, *optional*, defaults to 576):
            Number of image tokens per image.
        projector_type (`str`, *optional*, defaults to `"mlp2x_gelu"`):
            `"mlp2x_gelu"` (two layers) or `"linear"`.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the two-layer projector.
        multimodal_projector_bias (`bool`, *optional*, defaults to `True`):
            Whether the layers of the projector have a bias.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            `"default"` drops the CLS position and register positions of a ViT, `"full"` keeps every position.
        vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -2):
            Index of the tower's hidden states that become image features. With a list, the layers are concatenated.
            Must be -1 for a convolutional tower, which uses its last feature map.
        vision_hidden_size (`int`, *optional*):
            Number of channels of the vision features, the projector's input, summed over the selected layers. Only
            needed if `vision_config` has no `hidden_size` or `hidden_sizes`.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether `lm_head` shares the input embedding matrix. Set to `True` if `text_config` is tied.
        vm_head_type (`str`, *optional*, defaults to `"linear"`):
            `"linear"` (the paper), or with a residual block before the linear map: `"mlp"` (per patch) or
            `"attention"` (across the patches of one image).
        visual_vocab_size (`int`, *optional*, defaults to the decoder's vocabulary size):
            Vocabulary size of a visual token. A visual token is a distribution over the first `visual_vocab_size`
            tokens of the decoder's vocabulary. Smaller than the decoder's vocabulary if that was extended.
        use_pseudo_image_features (`bool`, *optional*, defaults to `False`):
            Whether pseudo image features (visual tokens × input embeddings) replace the image features at the
            decoder's input, in training and generation.

    Raises:
        `ValueError`: if a type is unknown or `visual_vocab_size` exceeds the decoder's vocabulary. Building the model
            raises it if the number of channels of the vision tower is unknown.
    """

    model_type = "vtlmm"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    attribute_map = {"image_token_index": "image_token_id"}

    vision_config: Any = None  # a dict or None becomes a PreTrainedConfig in __post_init__
    text_config: Any = None
    image_token_id: int = 32000
    image_seq_length: int = 576
    projector_type: str = "mlp2x_gelu"
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_select_strategy: str = "default"
    vision_feature_layer: int | list[int] = -2
    vision_hidden_size: int | None = None
    tie_word_embeddings: bool = False
    vm_head_type: str = "linear"
    visual_vocab_size: int | None = None
    use_pseudo_image_features: bool = False

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = AutoConfig.for_model(
                "clip_vision_model",
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
                projection_dim=768,
            )
        elif isinstance(self.vision_config, dict):
            self.vision_config = AutoConfig.for_model(**{"model_type": "clip_vision_model", **self.vision_config})
        if self.text_config is None:
            self.text_config = AutoConfig.for_model("llama")
        elif isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama", **self.text_config})

        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        if self.visual_vocab_size is None:
            self.visual_vocab_size = self.text_config.vocab_size
        self._check()
        self.auto_map = dict(AUTO_MAP)
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    @property
    def vision_feature_layers(self) -> list[int]:
        """Return `vision_feature_layer` as a list."""
        layers = self.vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)

    @property
    def is_convolutional(self) -> bool:
        """Return whether the vision tower has no attention."""
        return not hasattr(self.vision_config, "num_attention_heads")

    @property
    def vision_feature_size(self) -> int:
        """Return the number of channels of the vision features, the projector's input."""
        if self.vision_hidden_size is not None:
            return self.vision_hidden_size
        for name in ("hidden_size", "hidden_sizes"):
            size = getattr(self.vision_config, name, None)
            if size is not None:
                return (size if isinstance(size, int) else size[-1]) * len(self.vision_feature_layers)
        raise ValueError(
            f"The config of vision tower {self.vision_config.model_type!r} has no `hidden_size` or `hidden_sizes`. "
            "Set `vision_hidden_size` to its number of output channels."
        )

    def _check(self):
        choices = {
            "projector_type": ("linear", "mlp2x_gelu"),
            "vm_head_type": ("linear", "mlp", "attention"),
            "vision_feature_select_strategy": ("default", "full"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        if self.is_convolutional and self.vision_feature_layers != [-1]:
            raise ValueError(
                f"`vision_feature_layer` is {self.vision_feature_layer}, but a convolutional vision tower uses its "
                "last feature map. Set `vision_feature_layer` to -1."
            )
        if self.visual_vocab_size > self.text_config.vocab_size:
            raise ValueError(
                f"`visual_vocab_size` is {self.visual_vocab_size}, which exceeds the decoder's vocabulary of "
                f"{self.text_config.vocab_size} tokens. Set it to at most {self.text_config.vocab_size}."
            )

    def save_pretrained(self, save_directory, **kwargs):
        """
        Save the config as the base class does, with a local `auto_map`.

        The `auto_map` of a config from the Hub contains the repository id. The saved folder contains the code files,
        so the file names alone are correct there.
        """
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)


__all__ = ["VTLMMConfig"]
