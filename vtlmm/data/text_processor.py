# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Load the part of a processor that reads texts, without torch and without the classes of the model."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TokenizersBackend


FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
# Other files that may hold a chat template, an image processor or an adapter
OTHER_FILES = ("chat_template.json", "additional_chat_templates", "preprocessor_config.json", "adapter_config.json")
IMAGE_PROCESSORS = ("CLIPImageProcessor", "BitImageProcessor", "SiglipImageProcessor")


@dataclass
class TextProcessor:
    """
    The attributes of [`VTLMMProcessor`] that encode a conversation.

    Attributes:
        tokens_per_image (`int`): number of image tokens of one image.
    """

    tokenizer: Any
    chat_template: str
    image_token: str
    image_token_id: int
    tokens_per_image: int


def load_text_processor(name: str | os.PathLike) -> tuple[TextProcessor, int] | None:
    """
    Return the text part of a VT-LMM's processor, and the position limit of its decoder.

    The result is None for a Hub id and for a folder whose files need the classes of transformers to be understood.
    """
    folder = Path(name)
    if any((folder / file).exists() for file in OTHER_FILES) or not all((folder / file).is_file() for file in FILES):
        return None
    try:
        config, settings, tokenizer_settings = (json.loads((folder / file).read_text("utf-8")) for file in FILES[:3])
        max_positions = config["text_config"]["max_position_embeddings"]
        height, width = _image_size(settings["image_processor"])
        patch_size, strategy = settings["patch_size"], settings["vision_feature_select_strategy"]
        num_tokens = (height // patch_size) * (width // patch_size) + settings["num_additional_image_tokens"]
        is_known = (
            config["model_type"] == "vtlmm"
            and settings["processor_class"] == "VTLMMProcessor"
            and "chat_template" not in settings
            and tokenizer_settings["tokenizer_class"] in ("TokenizersBackend", "PreTrainedTokenizerFast")
            and "AutoTokenizer" not in tokenizer_settings.get("auto_map", {})
            and type(max_positions) is int
        )
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None
    if not is_known:
        return None
    tokenizer = TokenizersBackend.from_pretrained(folder)
    token = getattr(tokenizer, "image_token", None) or settings["image_token"]
    ids = tokenizer.encode(token, add_special_tokens=False)
    template = (folder / "chat_template.jinja").read_text("utf-8")
    if len(ids) != 1:
        return None
    return TextProcessor(tokenizer, template, token, ids[0], num_tokens - (strategy == "default")), max_positions


def _image_size(settings: dict) -> tuple[int, int]:
    """
    Return the height and width in pixels of every processed image.

    Raises:
        `KeyError`: if the settings do not say them.
    """
    kind = settings["image_processor_type"].removesuffix("Pil").removesuffix("Fast")
    if kind not in IMAGE_PROCESSORS or settings.get("do_pad") or settings["do_resize"] is not True:
        raise KeyError("image_processor_type")
    side = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
    return side["height"], side["width"]
