# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Projector, VM head and helpers around the vision tower and the decoder."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .configuration_vtlmm import VTLMMConfig
from .outputs_vtlmm import VTLMMModelOutputWithPast


def _pass_through(hidden_states, *args, **kwargs):
    return hidden_states


def skip_unused_layers(vision_tower: nn.Module, config: VTLMMConfig) -> None:
    """Skip the layers above the highest one in `vision_feature_layer` in the forward. They keep their weights."""
    num_layers = getattr(config.vision_config, "num_hidden_layers", None)
    stacks = [m for m in vision_tower.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if num_layers is None or len(stacks) != 1:  # convolutional, or an unknown structure: compute all layers
        return
    # hidden_states[0] is the input of layer 0, hidden_states[i] is the output of layer i - 1.
    used = max(layer % (num_layers + 1) for layer in config.vision_feature_layers)
    for layer in stacks[0][used:]:
        layer.forward = _pass_through


def select_vision_features(outputs, config: VTLMMConfig) -> torch.Tensor:
    """Return the tower's output as (num_images, num_patches, vision_feature_size)."""
    if outputs.last_hidden_state.ndim == 4:  # convolutional: (num_images, channels, height, width)
        return outputs.last_hidden_state.flatten(2).transpose(1, 2)
    features = torch.cat([outputs.hidden_states[layer] for layer in config.vision_feature_layers], dim=-1)
    # "default" for CLIP and DINOv2, "full" for SigLIP, which has no CLS position.
    if config.vision_feature_select_strategy == "default":
        features = features[:, 1 + getattr(config.vision_config, "num_register_tokens", 0) :]
    return features


def zero_image(vision_config: PreTrainedConfig, device) -> torch.Tensor:
    """Return the pixel values of one image of zeros in the input size of the vision tower."""
    size = getattr(vision_config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, getattr(vision_config, "num_channels", 3), height, width, device=device)


def require_input_gradient(decoder: nn.Module, arguments: tuple, kwargs: dict) -> None:
    """
    Forward pre-hook: make the decoder's input embeddings require a gradient if a parameter of the decoder does.

    Without this hook, reentrant checkpointing returns no gradients for adapters. The hook of transformers is on the
    embeddings of every submodule, so a frozen tower or decoder would store activations. The check runs
    at each forward pass because PEFT calls `enable_input_require_grads` before it adds the adapter.
    """
    inputs_embeds = kwargs.get("inputs_embeds")
    if inputs_embeds is None or not torch.is_grad_enabled():
        return
    if any(parameter.requires_grad for parameter in decoder.parameters()):
        inputs_embeds.requires_grad_(True)


def gathered_weight(module: nn.Module) -> torch.Tensor:
    """
    Return the complete `module.weight` for use outside `module.forward`.

    FSDP2 and accelerate's offloading load a module's weight when its forward is called. FSDP2 frees the weight after
    the backward pass. `full_tensor()` would cut the gradient to the weight.
    """
    if hasattr(module, "unshard"):  # FSDP2
        cast(Any, module).unshard()
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return cast(torch.Tensor, module.weight)
    hook.pre_forward(module)  # accelerate: loads an offloaded weight to the execution device
    weight = module.weight
    hook.post_forward(module, weight)
    return cast(torch.Tensor, weight)


class VTLMMProjector(nn.Module):
    """The paper's adapter g. Maps the features of the vision tower to the decoder's hidden size."""

    def __init__(self, config: VTLMMConfig):
        super().__init__()
        hidden_size, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(config.vision_feature_size, hidden_size, bias=bias)
        self.two_layers = config.projector_type == "mlp2x_gelu"
        if self.two_layers:
            self.act = ACT2FN[config.projector_hidden_act]
            self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.linear_1(features)
        return self.linear_2(self.act(features)) if self.two_layers else features


class VTLMMZeroLinear(nn.Linear):
    """A linear layer that is initialized with zeros."""


class VTLMMMLPBlock(nn.Module):
    """v + W₂ gelu(W₁ v) for each patch. W₂ is initialized with zeros, so the initial head is the linear one."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.input = nn.Linear(hidden_size, hidden_size)
        self.output = VTLMMZeroLinear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.output(F.gelu(self.input(features)))


class VTLMMAttentionBlock(nn.Module):
    """v + W₂ attention(v) across the patches of one image. W₂ is initialized with zeros, as in the MLP block."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden_size)
        self.input = nn.Linear(hidden_size, 3 * hidden_size)
        self.output = VTLMMZeroLinear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        num_images, num_patches, hidden_size = features.shape
        head_size = hidden_size // self.num_heads  # explicit, since -1 fails for 0 images
        qkv = self.input(self.norm(features)).view(num_images, num_patches, 3, self.num_heads, head_size)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        return features + self.output(mixed.reshape(num_images, num_patches, hidden_size))


class VTLMMVisualHead(nn.Linear):
    """
    The VM head. Maps image features (num_images, num_patches, hidden_size) to visual logits (…, visual_vocab_size).

    The head is a linear layer without bias (the paper) after an optional residual block. `weight` is the matrix of the
    linear layer, (visual_vocab_size, hidden_size).
    """

    def __init__(self, config: VTLMMConfig):
        hidden_size = config.text_config.hidden_size
        super().__init__(hidden_size, cast(int, config.visual_vocab_size), bias=False)
        self.residual_block: nn.Module = nn.Identity()
        if config.vm_head_type == "mlp":
            self.residual_block = VTLMMMLPBlock(hidden_size)
        elif config.vm_head_type == "attention":
            self.residual_block = VTLMMAttentionBlock(hidden_size, config.text_config.num_attention_heads)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return super().forward(self.residual_block(image_features))

    def truncate_vocabulary(self, num_words: int) -> int:
        """Keep at most the first `num_words` rows of the head, and return the resulting number of rows."""
        if num_words < self.out_features:
            requires_grad = self.weight.requires_grad
            self.weight = nn.Parameter(self.weight.detach()[:num_words].clone(), requires_grad=requires_grad)
            self.out_features = num_words
        return self.out_features


def image_predictions(
    vm_head: VTLMMVisualHead, outputs: VTLMMModelOutputWithPast, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the features and the weight whose product is the visual logits of some patches.

    Args:
        vm_head ([`VTLMMVisualHead`]): the VM head, or a candidate for it.
        outputs ([`VTLMMModelOutputWithPast`]): with `image_features` and `image_token_mask`.
        positions (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): the N image tokens to select.

    Returns:
        `tuple`: features `(N, hidden_size)` after the residual block, and weight `(visual_vocab_size, hidden_size)`.
    """
    features = vm_head.residual_block(outputs.image_features).flatten(0, 1)
    return features[positions[outputs.image_token_mask]], gathered_weight(vm_head)
