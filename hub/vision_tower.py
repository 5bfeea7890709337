# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A vision tower from any checkpoint, its image processor, and what the processor and the config must know of it."""

import logging
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, LlavaImageProcessorPil, PreTrainedModel

from vtlmm.data.images import processed_size

from .assembly import quiet_loading, require_native


logger = logging.getLogger(__name__)

# What a tower's checkpoint may have besides the tower: task heads, and the other half of a two-tower model.
HEADS = ("classifier", "head", "text_model", "text_projection", "visual_projection", "logit_scale", "logit_bias")


@dataclass
class TowerGeometry:
    """
    How many image features a tower gives, and where.

    num_patches (`int`), patch_size (`int`, pixels per side; the total stride of a convolutional tower),
    hidden_size (`int`, channels of the selected layers together),
    has_cls (`bool`): whether positions that are no patches (CLS, registers) stand in front,
    feature_layer (`int` or `list[int]`): `vision_feature_layer` of the model's config.
    """

    num_patches: int
    patch_size: int
    hidden_size: int
    has_cls: bool
    feature_layer: int | list[int]

    def config_values(self) -> dict:
        """What [`VTLMMConfig`] is told of the tower."""
        return {
            "image_seq_length": self.num_patches,
            "vision_hidden_size": self.hidden_size,
            "vision_feature_layer": self.feature_layer,
            "vision_feature_select_strategy": "default" if self.has_cls else "full",
        }

    def processor_values(self) -> dict:
        """What [`VTLMMProcessor`] is told of the tower."""
        return {
            "patch_size": self.patch_size,
            "vision_feature_select_strategy": "default" if self.has_cls else "full",
            # The processor takes back one position for "default"; the model drops CLS and registers together.
            "num_additional_image_tokens": int(self.has_cls),
        }


def vision_config_of(name: str, trust_remote_code: bool = False):
    """The config of the tower in checkpoint `name`: of a two-tower model (CLIP, SigLIP) the vision part's."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    return getattr(config, "vision_config", config)


def load_vision_tower(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    r"""
    The tower of checkpoint `name`, in float32. Tensors that it has no use for are logged, unless they belong to a head
    or to the other half of a two-tower model.

    Raises:
        `ValueError`: when a part of the tower is not in the checkpoint, or its code is not transformers' own.
    """
    config = vision_config_of(name, trust_remote_code)
    with quiet_loading():
        tower, info = AutoModel.from_pretrained(
            name, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    require_native(tower, name)
    if info["missing_keys"]:
        raise ValueError(
            f"The checkpoint {name} lacks parts of its vision tower ({tower.__class__.__name__}): "
            f"{', '.join(sorted(info['missing_keys']))}."
        )
    unused = [key for key in sorted(info["unexpected_keys"]) if not any(part in HEADS for part in key.split("."))]
    if unused:
        logger.warning("Of the checkpoint %s these tensors were not used: %s.", name, ", ".join(unused))
    return tower.eval()


def load_image_processor(name: str, vision_config, pad_to_square: bool = True, trust_remote_code: bool = False):
    r"""
    The image processor of checkpoint `name`, on Pillow; of a CLIP tower the release's: pad to a square with the mean
    color, then resize.

    Args:
        pad_to_square (`bool`, *optional*, defaults to `True`): of a CLIP tower; `False` crops the middle.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"No image processor in {name}: put the tower's `preprocessor_config.json` beside its weights."
        ) from error
    if vision_config.model_type != "clip_vision_model":
        return processor
    kept = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    settings = processor.to_dict()
    return LlavaImageProcessorPil(do_pad=pad_to_square, **{key: settings[key] for key in kept})


@torch.no_grad()
def probe_tower(tower: PreTrainedModel, image_processor, feature_layer: int | list[int] | None = None):
    r"""
    Run `tower` on one image of zeros, in the size that `image_processor` gives, and count what comes out.

    Args:
        feature_layer (`int` or `list[int]`, *optional*): the layers to take features from; by default -2, and -1 of a
            convolutional tower.

    Returns:
        [`TowerGeometry`]

    Raises:
        `ValueError`: when the image processor does not give one size for all images, or the positions are neither
        patches alone nor patches after CLS (and registers).
    """
    height, width = processed_size(image_processor)
    name = tower.__class__.__name__
    outputs = tower(torch.zeros(1, 3, height, width), output_hidden_states=True, return_dict=True)
    if outputs.last_hidden_state.ndim == 4:
        if feature_layer not in (None, -1, [-1]):
            raise ValueError(f"{name} is convolutional and gives its last map: leave `vision_feature_layer` at -1.")
        channels, rows, columns = outputs.last_hidden_state.shape[1:]
        if (height // (height // rows), width // (height // rows)) != (rows, columns):
            raise ValueError(
                f"{name} gives {rows} × {columns} positions for {height} × {width} pixels, no one stride."
            )
        return TowerGeometry(rows * columns, height // rows, channels, has_cls=False, feature_layer=-1)

    feature_layer = -2 if feature_layer is None else feature_layer
    layers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    num_states = len(outputs.hidden_states)
    if not all(-num_states <= layer < num_states for layer in layers):
        raise ValueError(f"`vision_feature_layer` is {feature_layer}, but {name} has {num_states} hidden states.")
    features = torch.cat([outputs.hidden_states[layer] for layer in layers], dim=-1)
    patch_size = getattr(tower.config, "patch_size", None)
    num_patches = (height // patch_size) * (width // patch_size) if isinstance(patch_size, int) else -1
    num_others = features.shape[1] - num_patches
    if num_others not in (0, 1 + getattr(tower.config, "num_register_tokens", 0)):
        raise ValueError(
            f"{name} gives {features.shape[1]} positions for {height} × {width} pixels with patch_size {patch_size}: "
            "neither one per patch, nor CLS and registers before them. Such a tower is not supported."
        )
    return TowerGeometry(num_patches, patch_size, features.shape[-1], num_others > 0, feature_layer)
