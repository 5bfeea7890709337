# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Tiny vision towers and decoders to compose. Test files import the fixtures."""

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM

from .byte_tokenizers import CHATML, byte_tokenizer
from .tiny_models import scale_weights


SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER = {**SIZE, "hidden_size": 16, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14}
DINO = {key: value for key, value in TOWER.items() if key != "intermediate_size"}
TEXT_TOWER = {**SIZE, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# model_type, saved class, config, image processor and its settings; then what compose must find:
# image tokens, positions before the patches, channels
CROP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
TOWERS = {
    "clip": ("CLIPModel", {"vision_config": TOWER, "text_config": TEXT_TOWER}, "CLIP", CROP, (4, 1, 16)),
    "siglip": (
        "SiglipModel",
        {"vision_config": TOWER, "text_config": TEXT_TOWER},
        "Siglip",
        {"size": {"height": 28, "width": 28}},
        (4, 0, 16),
    ),
    "dinov2": ("Dinov2Model", {**DINO, "image_size": 42}, "Bit", CROP, (4, 1, 16)),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        {**DINO, "num_register_tokens": 2},
        "Bit",
        CROP,
        (4, 3, 16),
    ),
    "mobilenet_v2": (
        "MobileNetV2ForImageClassification",
        {"image_size": 64, "depth_multiplier": 0.25},
        "MobileNetV2",
        {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}},
        (4, 0, 1280),
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_stages": 4},
        "ConvNext",
        {"size": {"shortest_edge": 64}, "crop_pct": 0.875},
        (4, 0, 32),
    ),
}
# config, rows beyond the tokenizer's tokens, settings of the tokenizer, its template
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
DECODERS = {
    "llama": ({"num_key_value_heads": 2}, 0, {}, None),
    "mistral": ({"num_key_value_heads": 2, "sliding_window": None}, 0, {"pad": "<pad>"}, None),
    "qwen2": (
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        5,
        {"special": CHAT_TOKENS, "bos": None, "eos": "<|endoftext|>", "pad": "<|endoftext|>", "unk": None},
        CHATML,
    ),
    "qwen3": (
        {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
        0,
        {"special": CHAT_TOKENS, "bos": None, "eos": "<|endoftext|>", "unk": None},
        CHATML,
    ),
}


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory):
    """Return a function from a tower's name to its folder with weights and image processor."""
    folders = {}

    def get(name: str) -> str:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            class_name, config, processor, settings, _ = TOWERS[name]
            model_class = getattr(transformers, class_name)
            torch.manual_seed(0)
            model = model_class(AutoConfig.for_model(name, **config))
            (scale_weights(model) if "Image" not in class_name else model).save_pretrained(folder)
            getattr(transformers, f"{processor}ImageProcessorPil")(**settings).save_pretrained(folder)
            folders[name] = str(folder)
        return folders[name]

    return get


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory):
    """Return a function from a decoder's name to its folder with weights and tokenizer."""
    folders = {}

    def get(name: str) -> str:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            config, spare_rows, settings, template = DECODERS[name]
            tokenizer = byte_tokenizer(**settings)
            tokenizer.chat_template = template
            ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            config = AutoConfig.for_model(name, **SIZE, **config, **ids, vocab_size=len(tokenizer) + spare_rows)
            torch.manual_seed(1)
            scale_weights(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            folders[name] = str(folder)
        return folders[name]

    return get


def asked(processor, image=None, **kwargs):
    image = image or Image.new("RGB", (80, 50), (200, 30, 30))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        **kwargs,
    )
