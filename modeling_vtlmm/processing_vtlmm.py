# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Processor of VT-LMM, which replaces each `<image>` in the text by one image token per patch."""

from typing import Any

import torch
from transformers import ProcessorMixin
from transformers.image_utils import ImageInput, get_image_size, to_numpy_array
from transformers.processing_utils import MultiModalData

from .configuration_vtlmm import AUTO_MAP


class VTLMMProcessor(ProcessorMixin):
    r"""
    Convert texts with `<image>` placeholders and images to `input_ids`, `attention_mask` and `pixel_values`.

    The arguments are the same as those of transformers' `LlavaProcessor`.

    Args:
        image_processor ([`BaseImageProcessor`]): resizes and normalizes images.
        tokenizer ([`PreTrainedTokenizerBase`]): must have `image_token` as one token.
        patch_size (`int`): side length of a patch in pixels. For a convolutional tower, the total stride.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`): value of the model's config.
            `"default"` drops one additional position (CLS).
        chat_template (`str`, *optional*): Jinja template for conversations.
        image_token (`str`, *optional*, defaults to `"<image>"`): placeholder for an image.
        num_additional_image_tokens (`int`, *optional*, defaults to 0): 1 for a vision tower with a CLS
            position, else 0. Register positions do not count: the model drops them together with CLS.

    Raises:
        `ValueError`: if the tokenizer splits `image_token` into several tokens.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy="default",
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        **kwargs,
    ):
        self.patch_size = patch_size
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_additional_image_tokens = num_additional_image_tokens
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        ids = tokenizer.encode(self.image_token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"The tokenizer splits the image token {self.image_token!r} into {len(ids)} tokens. Add it with "
                f"`tokenizer.add_special_tokens({{'additional_special_tokens': ['{self.image_token}']}})`."
            )
        self.image_token_id = ids[0]
        # Set here because saving sets it on this object only, and a reloaded processor would differ.
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs: Any):
        r"""
        Process texts and images as the base class does.

        `images` is a list of images in the order of their placeholders, or a list with one list of images per text.
        Empty lists count as no images. No BOS token is added to texts that start with one, because some chat templates
        write it.

        Raises:
            `ValueError`: if the number of images of a text differs from its number of placeholders, or if videos or
                audio are passed.
        """
        for name in ("videos", "audio"):
            if kwargs.get(name) is not None:
                raise ValueError(f"VT-LMM does not support `{name}`. Pass images with one `{self.image_token}` each.")
        texts = [text] if isinstance(text, str) else text
        if isinstance(images, list | tuple) and all(isinstance(row, list | tuple) and not row for row in images):
            images = None
        if texts and all(isinstance(one, str) for one in texts):
            self._check_placeholders(texts, images)
            bos = self.tokenizer.bos_token
            if bos and all(one.startswith(bos) for one in texts):
                if "text_kwargs" in kwargs:
                    kwargs["text_kwargs"] = {"add_special_tokens": False} | kwargs["text_kwargs"]
                else:
                    kwargs.setdefault("add_special_tokens", False)
        return super().__call__(images=images, text=text, **kwargs)

    def _check_placeholders(self, texts: list[str], images: ImageInput | None) -> None:
        """Raise a `ValueError` that names the first text whose placeholders do not match its images."""
        placeholders = [text.count(self.image_token) for text in texts]
        if isinstance(images, list | tuple) and any(isinstance(row, list | tuple) for row in images):
            counts = [_num_images(row) for row in images]
            if len(counts) != len(texts):
                raise ValueError(
                    f"`images` has {len(counts)} lists of images for {len(texts)} texts. The number of image tokens "
                    "in the prompts should be the same as the number of images: pass one list per text, which is "
                    "empty for a text without images."
                )
        else:
            num_images = _num_images(images)
            counts = []
            for number in placeholders:  # images of a flat list belong to the placeholders in their order
                counts.append(min(number, num_images - sum(counts)))
            counts[-1] = num_images - sum(counts[:-1])
        for i, (number, count) in enumerate(zip(placeholders, counts, strict=True)):
            if number != count:
                raise ValueError(
                    f"Text {i} ({texts[i][:60]!r}) has {number} {self.image_token} placeholders, but {count} images. "
                    f"Each image needs one {self.image_token} in its text."
                )

    def num_image_tokens(self, height: int, width: int) -> int:
        """Return the number of image tokens of an image of `height` × `width` pixels after the image processor."""
        num_tokens = (height // self.patch_size) * (width // self.patch_size) + self.num_additional_image_tokens
        return num_tokens - 1 if self.vision_feature_select_strategy == "default" else num_tokens

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Return the text that replaces the placeholder of image `image_idx`. The base class calls this method."""
        height, width = get_image_size(to_numpy_array(image_inputs["pixel_values"][image_idx]))
        return self.image_token * self.num_image_tokens(height, width)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Return the number of image tokens for images of sizes (height, width), for inference servers."""
        if image_sizes is None:
            return MultiModalData()
        processor = self.image_processor
        size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
        size = kwargs.get("crop_size") or size or processor.size
        side = size["shortest_edge"] if "shortest_edge" in size else None
        num_tokens = self.num_image_tokens(side or size["height"], side or size["width"])
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[num_tokens] * count, num_image_patches=[1] * count)

    def visual_words(self, token_ids: torch.Tensor) -> list:
        """Decode the ids of visual tokens to a nested list of strings in the shape of `token_ids`."""
        return [
            self.tokenizer.decode([int(ids)]).strip() if ids.ndim == 0 else self.visual_words(ids) for ids in token_ids
        ]


def _num_images(images: Any) -> int:
    """Return the number of images in an image, a batch of images (4-D array) or a nested list of them."""
    if images is None:
        return 0
    if isinstance(images, list | tuple):
        return sum(map(_num_images, images))
    return len(images) if getattr(images, "ndim", 3) == 4 else 1


__all__ = ["VTLMMProcessor"]
