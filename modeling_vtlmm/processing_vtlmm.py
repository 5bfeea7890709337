# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Processor of VT-LMM: images and text in, with one image token per patch where the text says `<image>`."""

import torch
from transformers import ProcessorMixin
from transformers.image_utils import ImageInput, get_image_size, to_numpy_array
from transformers.processing_utils import MultiModalData, ProcessingKwargs, Unpack

from .configuration_vtlmm import AUTO_MAP


class VTLMMProcessor(ProcessorMixin):
    r"""
    Turns texts with `<image>` marks and images into `input_ids`, `attention_mask` and `pixel_values`.

    The arguments are those of transformers' llava processor.

    Args:
        image_processor ([`BaseImageProcessor`])
        tokenizer ([`PreTrainedTokenizerBase`]): must know `image_token`.
        patch_size (`int`): pixels per side of a patch; for a convolutional tower the total stride.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`): as in the model's config;
            `"default"` means that one of the additional positions (CLS) is dropped.
        chat_template (`str`, *optional*)
        image_token (`str`, *optional*, defaults to `"<image>"`)
        num_additional_image_tokens (`int`, *optional*, defaults to 0): positions of the tower that are no patches
            (1 for the CLS position of CLIP).

    Raises:
        `ValueError`: when the tokenizer does not know `image_token` as one token.
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
                f"The tokenizer splits {self.image_token!r} into {len(ids)} tokens: add it as a special token first "
                f"(`tokenizer.add_special_tokens({{'additional_special_tokens': ['{self.image_token}']}})`)."
            )
        self.image_token_id = ids[0]
        # saving would set it on this object only, and a copy loaded from disk would not be the same
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ):
        """As in the base class; lists without any image (`[]`, `[[], []]`) count as none, and texts that all
        begin with BOS, as some chat templates write it, get no second one."""
        if isinstance(images, list | tuple) and all(isinstance(row, list | tuple) and not row for row in images):
            images = None
        texts, bos = [text] if isinstance(text, str) else text, self.tokenizer.bos_token
        if bos and texts and all(isinstance(one, str) and one.startswith(bos) for one in texts):
            if "text_kwargs" in kwargs:
                kwargs["text_kwargs"] = {"add_special_tokens": False} | kwargs["text_kwargs"]
            else:
                kwargs.setdefault("add_special_tokens", False)
        return super().__call__(images=images, text=text, **kwargs)

    def num_image_tokens(self, height: int, width: int) -> int:
        """Image tokens of one image that is `height` × `width` pixels after the image processor."""
        num_tokens = (height // self.patch_size) * (width // self.patch_size) + self.num_additional_image_tokens
        return num_tokens - 1 if self.vision_feature_select_strategy == "default" else num_tokens

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The text that stands for image `image_idx`: called by the base class for every `<image>`."""
        height, width = get_image_size(to_numpy_array(image_inputs["pixel_values"][image_idx]))
        return self.image_token * self.num_image_tokens(height, width)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Image tokens per image of the given (height, width); serving engines plan their batches with it."""
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
        """The words of visual tokens: a nested list of strings in the shape of `token_ids`, one word per id."""
        if token_ids.ndim == 0:
            return self.tokenizer.decode([int(token_ids)]).strip()
        return [self.visual_words(ids) for ids in token_ids]


__all__ = ["VTLMMProcessor"]
