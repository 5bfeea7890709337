# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Load the vision tower and image processor of a checkpoint, and find the number and size of its image features."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    LlavaImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging


logger = logging.getLogger(__name__)

# Other modules in a tower's checkpoint: task heads, and the text side of a two-tower model.
HEADS = ("classifier", "head", "text_model", "text_projection", "visual_projection", "logit_scale", "logit_bias")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide transformers' loading report, since the loaded keys are checked here."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def require_native(model: PreTrainedModel, name: str) -> None:
    """
    Check that `model` is implemented in transformers, because a VT-LMM folder cannot contain code of other models.

    Raises:
        `ValueError`: if the model's code came with its checkpoint.
    """
    if not type(model).__module__.startswith("transformers.models."):
        raise ValueError(
            f"{name} is a {type(model).__name__} with its own code. Use a model that transformers implements, because "
            "a VT-LMM folder cannot contain that code."
        )


def part_config(config: Any, name: str | None) -> Any:
    """Return the config of a part from checkpoint `name`, without local paths and lists of class labels."""
    name = name or ""
    if Path(name).is_dir() or name.startswith(("/", ".", "~")) or name.count("/") > 1 or set(name) & set("\\: "):
        config._name_or_path = ""
    config.num_labels = 2  # ImageNet's labels would be a thousand lines
    return config


@dataclass
class TowerGeometry:
    """
    The number, place and size of a tower's image features.

    num_patches (`int`), patch_size (`int`, pixels per side; the total stride of a convolutional tower),
    hidden_size (`int`, channels of the selected layers together),
    has_cls (`bool`): whether CLS and register positions come before the patches,
    feature_layer (`int` or `list[int]`): `vision_feature_layer` of the model's config.
    """

    num_patches: int
    patch_size: int
    hidden_size: int
    has_cls: bool
    feature_layer: int | list[int]

    def config_values(self) -> dict[str, Any]:
        """Return the arguments of [`VTLMMConfig`] that depend on the tower."""
        return {
            "image_seq_length": self.num_patches,
            "vision_hidden_size": self.hidden_size,
            "vision_feature_layer": self.feature_layer,
            "vision_feature_select_strategy": "default" if self.has_cls else "full",
        }

    def processor_values(self) -> dict[str, Any]:
        """Return the arguments of [`VTLMMProcessor`] that depend on the tower."""
        return {
            "patch_size": self.patch_size,
            "vision_feature_select_strategy": "default" if self.has_cls else "full",
            # The processor subtracts one position for "default"; the model drops CLS and registers together.
            "num_additional_image_tokens": int(self.has_cls),
        }


def vision_config_of(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the config of the tower in checkpoint `name`: of a two-tower model (CLIP, SigLIP) the vision part."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    return getattr(config, "vision_config", config)


def load_vision_tower(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    r"""
    Load the tower of checkpoint `name` in float32.

    Unused tensors are logged, unless they belong to a head or to the text side of a two-tower model.

    Raises:
        `ValueError`: if tensors of the tower are missing, or transformers does not implement the tower.
    """
    config = vision_config_of(name, trust_remote_code)
    with quiet_loading():
        tower, info = AutoModel.from_pretrained(
            name, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    require_native(tower, name)
    if info["missing_keys"]:
        raise ValueError(
            f"Tensors of the vision tower ({tower.__class__.__name__}) are missing in {name}: "
            f"{', '.join(sorted(info['missing_keys']))}."
        )
    unused = [key for key in sorted(info["unexpected_keys"]) if not any(part in HEADS for part in key.split("."))]
    if unused:
        logger.warning("Unused tensors in %s: %s.", name, ", ".join(unused))
    return tower.eval()


def load_image_processor(
    name: str, vision_config: PreTrainedConfig, pad_to_square: bool = True, trust_remote_code: bool = False
) -> Any:
    r"""
    Load the image processor of checkpoint `name`, on Pillow.

    A CLIP tower gets LLaVA's: pad the image to a square with the mean color, then resize it.

    Args:
        pad_to_square (`bool`, *optional*, defaults to `True`): for a CLIP tower; `False` crops the center.

    Raises:
        `ValueError`: if the checkpoint contains no image processor.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"{name} contains no image processor. Put the tower's `preprocessor_config.json` next to its weights."
        ) from error
    if vision_config.model_type != "clip_vision_model":
        return processor
    kept = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    settings = processor.to_dict()
    return LlavaImageProcessorPil(do_pad=pad_to_square, **{key: settings[key] for key in kept})


@torch.no_grad()
def probe_tower(
    tower: PreTrainedModel, image_processor: Any, feature_layer: int | list[int] | None = None
) -> TowerGeometry:
    r"""
    Run `tower` on one image of zeros, `(1, 3, height, width)` as `image_processor` resizes it, and measure the output.

    Args:
        feature_layer (`int` or `list[int]`, *optional*): layers to take features from; by default -2, and -1 for a
            convolutional tower.

    Returns:
        [`TowerGeometry`]

    Raises:
        `ValueError`: if the image processor gives several sizes, or the positions are neither the patches alone nor
            the patches after CLS (and registers).
    """
    height, width = _processed_size(image_processor)
    name = tower.__class__.__name__
    outputs = tower(torch.zeros(1, 3, height, width), output_hidden_states=True, return_dict=True)
    if outputs.last_hidden_state.ndim == 4:
        if feature_layer not in (None, -1, [-1]):
            raise ValueError(f"{name} is convolutional and has one feature map. Leave out `vision_feature_layer`.")
        channels, rows, columns = outputs.last_hidden_state.shape[1:]
        if (height // (height // rows), width // (height // rows)) != (rows, columns):
            raise ValueError(
                f"{name} gives {rows} × {columns} positions for {height} × {width} pixels. Its stride must be equal "
                "in both directions."
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
    num_expected = (0, 1 + getattr(tower.config, "num_register_tokens", 0))
    if not isinstance(patch_size, int) or num_others not in num_expected:
        raise ValueError(
            f"{name} gives {features.shape[1]} positions for {height} × {width} pixels with patch_size {patch_size}. "
            "Supported towers give one position per patch, with or without CLS and registers before the patches."
        )
    return TowerGeometry(num_patches, patch_size, features.shape[-1], num_others > 0, feature_layer)


def _processed_size(image_processor: Any) -> tuple[int, int]:
    """Return height and width in pixels of every processed image."""
    sizes: set[tuple[int, int]] = set()
    for size in ((96, 64), (64, 96)):
        pixel_values = image_processor(images=Image.new("RGB", size), return_tensors="pt")["pixel_values"]
        height, width = pixel_values.shape[-2:]
        sizes.add((height, width))
    if len(sizes) > 1:
        raise ValueError(
            f"The image processor gives images of different sizes ({sizes}), but a VT-LMM has a fixed number of image "
            "tokens. Set `do_center_crop`, or a `size` with height and width, in its preprocessor_config.json."
        )
    return sizes.pop()
