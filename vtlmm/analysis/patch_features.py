# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What a model holds at the patches of images: tower features, image features, and the decoder's hidden states."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from vtlmm.data.images import prepare_images
from vtlmm.inference.generation import conversation


@dataclass
class Patches:
    """
    Patches of I images, P each, in raster order.

    vision_features (`torch.Tensor` of shape `(I, P, vision_feature_size)`): the tower's.
    image_features (`torch.Tensor` of shape `(I, P, D)`): the projector's, v.
    mixed_features (`torch.Tensor` of shape `(I, P, D)`): as the VM head's matrix gets them; v for a linear head.
    left_states (`torch.Tensor` of shape `(I, P, D)`): of the position left of each patch, from which it is predicted.
    layer_states (`dict[int, torch.Tensor]` of shape `(I, P, D)`): layer to the hidden states at the patches, through
        the decoder's last norm, as `lm_head` gets them; 0 is the decoder's input.
    """

    vision_features: torch.Tensor
    image_features: torch.Tensor
    mixed_features: torch.Tensor
    left_states: torch.Tensor
    layer_states: dict[int, torch.Tensor]


@torch.inference_mode()
def read_patches(model, processor, images: list) -> Patches:
    r"""
    Runs the model over images, each at the start of a user's turn of its own. Attention is causal, so that no
    question would change what is read.

    Args:
        images (`list`): images from PIL, in RGB.

    Raises:
        `ValueError`: for a chat template that puts nothing before a image: its first patch has no left neighbor.
    """
    model.eval()
    inputs = processor.apply_chat_template(
        [conversation({"images": [image], "question": ""}) for image in images],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device)
    encoded = model.get_image_features(inputs.pop("pixel_values"))
    outputs = model.model(
        **inputs,
        mm_encoder_outputs={"image": encoded},
        use_cache=False,
        output_hidden_states=True,
        output_image_token_mask=True,
    )
    mask = outputs.image_token_mask
    if mask[:, 0].any():
        raise ValueError("The chat template begins with the image, so that nothing predicts its first patch.")
    shape = (len(images), encoded.image_features.shape[1], -1)
    last = len(outputs.hidden_states) - 1
    norm = getattr(model.model.language_model, "norm", None)
    layers = {}
    for layer, states in enumerate(outputs.hidden_states[:-1]):
        # CODEPATH: a decoder that names its last norm otherwise has a lens at the last layer only
        if norm is not None:
            layers[layer] = norm(states[mask]).view(shape)
    layers[last] = outputs.last_hidden_state[mask].view(shape)
    return Patches(
        vision_features=encoded.vision_features,
        image_features=encoded.image_features,
        mixed_features=model.model.vm_head.residual_block(encoded.image_features),
        left_states=outputs.last_hidden_state[:, :-1][mask[:, 1:]].view(shape),
        layer_states=layers,
    )


def heads(model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weights (V, D) of `vm_head` and `lm_head` and the input embeddings, over the words of a visual token."""
    vm_weight = model.model.vm_head.weight.detach()
    rest = (module.weight.detach()[: len(vm_weight)] for module in (model.lm_head, model.get_input_embeddings()))
    return vm_weight, *rest


def grid_side(num_patches: int) -> int:
    """
    Raises:
        `ValueError`: where the patches are no square.
    """
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise ValueError(f"{num_patches} patches are no square grid: only square images have boxes and drawings.")
    return side


def patch_words(model, processor, images: list) -> tuple[list, torch.Tensor]:
    """The likeliest word of every patch, a list of lists of strings, and its probability (num_images, num_patches)."""
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(model.device)
    tokens = model.get_visual_tokens(pixel_values, top_k=1)
    return processor.visual_words(tokens.token_ids[..., 0]), tokens.probabilities[..., 0].float().cpu()


def shown_image(processor, image) -> np.ndarray:
    """The image as the vision tower sees it (padded, cropped, resized), (height, width, 3) in 0..1."""
    pixels = np.asarray(
        processor.image_processor(prepare_images([image], processor.image_processor))["pixel_values"][0]
    )
    mean = np.reshape(getattr(processor.image_processor, "image_mean", None) or [0.5] * 3, (3, 1, 1))
    std = np.reshape(getattr(processor.image_processor, "image_std", None) or [0.5] * 3, (3, 1, 1))
    return np.clip(pixels * std + mean, 0, 1).transpose(1, 2, 0)


def patches_inside(processor, image, boxes: list, num_patches: int) -> torch.Tensor:
    r"""
    Which patches are covered by boxes by a half or more, `(num_patches,)`.

    The boxes are painted and go through the image processor, which may pad, cut or resize.

    Args:
        image: the image from PIL.
        boxes (`list`): `[left, top, right, bottom]` in its pixels.
    """
    side = grid_side(num_patches)
    painted = Image.new("RGB", image.size)
    draw = ImageDraw.Draw(painted)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill="white")
    images = [painted, *(Image.new("RGB", image.size, color) for color in ("black", "white"))]
    painted, black, white = (np.asarray(processor.image_processor([p])["pixel_values"][0])[0] for p in images)
    covered = (painted - black) / np.max(white - black)  # whatever the padding is, it is the same in all
    covered = torch.from_numpy(covered.astype(np.float32))
    means = torch.nn.functional.adaptive_avg_pool2d(covered[None, None], (side, side))
    return means.flatten() >= 0.5
