# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Describe vision tower and projector in the terms of llama.cpp (its `mmproj` file): metadata and tensors."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from .checkpoint_files import StoredTensor
from .convert import TOWER
from .gguf_file import GGUFTensor


PROJECTOR = "model.multi_modal_projector."
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
EMBEDDING_NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}


def feature_layers(config: Any) -> list[int]:
    """Return the selected hidden states as numbers of layers: 1 is the output of the first layer."""
    depth = config.vision_config.num_hidden_layers
    return [layer % (depth + 1) for layer in config.vision_feature_layers]


def reason_without_vision(config: Any, image_processor: Any) -> str | None:
    """
    Return why llama.cpp cannot run the vision tower and the projector of a VT-LMM, or None if it can.

    Args:
        config ([`VTLMMConfig`]), image_processor ([`BaseImageProcessor`])
    """
    tower = config.vision_config
    if config.is_convolutional:
        return f"its vision tower, a {tower.model_type}, is convolutional, and llama.cpp's LLaVA needs a ViT"
    if tower.model_type not in (CLIP, SIGLIP):
        return f"its vision tower is a {tower.model_type}; llama.cpp's LLaVA has the towers of SigLIP and CLIP"
    if config.vision_feature_select_strategy != ("default" if tower.model_type == CLIP else "full"):
        return "it gives the decoder the CLS position of its CLIP tower, which llama.cpp leaves out"
    if tower.hidden_act not in ACTIVATIONS:
        return f"its vision tower has the activation {tower.hidden_act!r}; llama.cpp has {', '.join(ACTIVATIONS)}"
    if config.projector_type != "mlp2x_gelu" or config.projector_hidden_act != "gelu":
        return (
            f"its projector is {config.projector_type!r} with {config.projector_hidden_act!r}, but llama.cpp's has "
            "two layers (mlp2x_gelu) with gelu"
        )
    layers = feature_layers(config)
    if layers[0] == 0 or layers != sorted(set(layers)):
        return f"`vision_feature_layer` is {config.vision_feature_layer}; llama.cpp needs layers in ascending order"
    size = getattr(image_processor, "crop_size", None) if getattr(image_processor, "do_center_crop", False) else None
    size = dict(size or image_processor.size)
    side = size.get("height", size.get("shortest_edge"))
    if side != tower.image_size or size.get("width", side) != side:
        return f"its image processor gives images of {size}, but llama.cpp uses the tower's {tower.image_size} pixels"
    return _reason_without_pixels(image_processor)


def _reason_without_pixels(image_processor: Any) -> str | None:
    """Return why pixel values are not `(pixel / 255 - mean) / std`, which llama.cpp computes, or None if they are."""
    for step in ("do_rescale", "do_normalize"):
        if not getattr(image_processor, step):
            return f"its image processor has `{step}: false`, but llama.cpp always rescales and normalizes pixels"
    if not math.isclose(image_processor.rescale_factor, 1 / 255, rel_tol=1e-4):
        return (
            f"its image processor has `rescale_factor: {image_processor.rescale_factor:g}`, but llama.cpp always "
            "divides pixels by 255"
        )
    return None


def add_vision(writer: Any, config: Any, image_processor: Any) -> None:
    """Add the sizes of tower and projector to the metadata of a GGUF file."""
    tower, layers = config.vision_config, feature_layers(config)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", tower.hidden_act != "quick_gelu")
    sizes = {
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "embedding_length": tower.hidden_size,
        "feed_forward_length": tower.intermediate_size,
        "projection_dim": config.text_config.hidden_size,
        "attention.head_count": tower.num_attention_heads,
        "block_count": max(layers),
    }
    for name, size in sizes.items():
        writer.add_uint32(f"clip.vision.{name}", size)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", tower.layer_norm_eps)
    # Without this key, llama.cpp takes the second-to-last layer of the file.
    writer.add_array("clip.vision.feature_layer", layers)
    writer.add_array("clip.vision.image_mean", [float(value) for value in image_processor.image_mean])
    writer.add_array("clip.vision.image_std", [float(value) for value in image_processor.image_std])


def vision_tensors(tensors: Mapping[str, StoredTensor | torch.Tensor], config: Any) -> list[GGUFTensor]:
    """Return the tensors of tower and projector under llama.cpp's names, without layers that are not used."""
    last = max(feature_layers(config))
    gguf_tensors = []
    for name, tensor in tensors.items():
        if name.startswith(TOWER):
            theirs = _tower_name(name.removeprefix(TOWER), last)
            if theirs is not None:
                gguf_tensors.append(GGUFTensor(theirs, tensor, keep_float32="embd" in theirs))
        elif name.startswith(PROJECTOR):
            theirs = name.removeprefix(PROJECTOR).replace("linear_1", "mm.0").replace("linear_2", "mm.2")
            gguf_tensors.append(GGUFTensor(theirs, tensor))
    if not config.multimodal_projector_bias:  # llama.cpp's projector always adds a bias
        zeros = torch.zeros(config.text_config.hidden_size)
        gguf_tensors += [GGUFTensor("mm.0.bias", zeros), GGUFTensor("mm.2.bias", zeros)]
    return gguf_tensors


def _tower_name(name: str, last: int) -> str | None:
    """Return llama.cpp's name of a tensor of the tower, or None for a tensor above layer `last` or in a head."""
    if name in EMBEDDING_NAMES:
        return EMBEDDING_NAMES[name]
    parts = name.split(".")
    if parts[:2] != ["encoder", "layers"] or int(parts[2]) >= last:
        return None
    return f"v.blk.{parts[2]}.{LAYER_NAMES['.'.join(parts[3:-1])]}.{parts[-1]}"
