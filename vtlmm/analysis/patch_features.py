# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Features of the patches of images: vision tower, projector and hidden states of the decoder."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from vtlmm.data.images import prepare_images
from vtlmm.inference.generation import conversation


@dataclass
class Patches:
    """
    Features of I images with P patches each, in raster order.

    Args:
        vision_features (`torch.Tensor` of shape `(I, P, vision_feature_size)`): Output of the vision tower.
        image_features (`torch.Tensor` of shape `(I, P, D)`): Output v of the projector.
        mixed_features (`torch.Tensor` of shape `(I, P, D)`): Input of the VM head's matrix; v for a linear head.
        left_states (`torch.Tensor` of shape `(I, P, D)`): Last hidden state of the position to the left of each patch,
            which predicts the patch.
        layer_states (`dict[int, torch.Tensor]` of shape `(I, P, D)`): Layer to the hidden states at the patches after
            the decoder's last norm. Layer 0 is the decoder's input.
    """

    vision_features: torch.Tensor
    image_features: torch.Tensor
    mixed_features: torch.Tensor
    left_states: torch.Tensor
    layer_states: dict[int, torch.Tensor]


@torch.inference_mode()
def read_patches(model, processor, images: list[Image.Image]) -> Patches:
    r"""
    Run the model over images, each in a user turn without text. Attention is causal, so a question after the image
    would not change the features.

    Args:
        model ([`VTLMMForConditionalGeneration`]), processor ([`VTLMMProcessor`])
        images (`list[PIL.Image.Image]`): Images in RGB.

    Raises:
        ValueError: If the chat template begins with the image, so that no position predicts its first patch.
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
        raise ValueError(
            "The chat template begins with the image, so no position predicts its first patch. Add a BOS token "
            "or text before the image."
        )
    shape = (len(images), encoded.image_features.shape[1], -1)
    last = len(outputs.hidden_states) - 1
    norm = getattr(model.model.language_model, "norm", None)
    layers = {}
    for layer, states in enumerate(outputs.hidden_states[:-1]):
        # If the decoder's last norm has another name, only the last layer can be read
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
    """Return the weights (V, D) of `vm_head`, `lm_head` and the input embeddings, for the words of a visual token."""
    vm_weight = model.model.vm_head.weight.detach()
    lm_weight = model.lm_head.weight.detach()[: len(vm_weight)]
    return vm_weight, lm_weight, model.get_input_embeddings().weight.detach()[: len(vm_weight)]


def grid_side(num_patches: int) -> int:
    """
    Return the number of patches per side of a square image.

    Raises:
        ValueError: If the patches do not form a square.
    """
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise ValueError(f"{num_patches} patches do not form a square grid. Boxes and plots need square images.")
    return side


def shown_image(processor, image: Image.Image) -> np.ndarray:
    """Return the image as the vision tower sees it (padded, cropped, resized), (height, width, 3) in 0..1."""
    image_processor = processor.image_processor
    pixels = np.asarray(image_processor(prepare_images([image], image_processor))["pixel_values"][0])
    mean = np.reshape(getattr(image_processor, "image_mean", None) or [0.5] * 3, (3, 1, 1))
    std = np.reshape(getattr(image_processor, "image_std", None) or [0.5] * 3, (3, 1, 1))
    return np.clip(pixels * std + mean, 0, 1).transpose(1, 2, 0)


def patches_inside(processor, image: Image.Image, boxes: list, num_patches: int) -> torch.Tensor:
    r"""
    Return which patches are at least half covered by boxes, `(num_patches,)`.

    The boxes are drawn as an image and go through the image processor, which may pad, crop or resize.

    Args:
        processor ([`VTLMMProcessor`])
        image (`PIL.Image.Image`): The image that the boxes belong to.
        boxes (`list`): Boxes `[left, top, right, bottom]` in pixels of the image.
        num_patches (`int`): Number of patches of the image.
    """
    side = grid_side(num_patches)
    mask = Image.new("RGB", image.size)
    draw = ImageDraw.Draw(mask)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill="white")
    images = [mask, *(Image.new("RGB", image.size, color) for color in ("black", "white"))]
    drawn, black, white = (np.asarray(processor.image_processor([p])["pixel_values"][0])[0] for p in images)
    # the padding is the same in all three images
    covered = torch.from_numpy(((drawn - black) / np.max(white - black)).astype(np.float32))
    means = torch.nn.functional.adaptive_avg_pool2d(covered[None, None], (side, side))
    return means.flatten() >= 0.5
