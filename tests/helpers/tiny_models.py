# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Tiny models and processors for the tests; no network, no files of other projects."""

import os
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, CLIPImageProcessorPil, PreTrainedTokenizerFast

from modeling_vtlmm import VTLMMConfig, VTLMMProcessor


# Threads of such small models only wait for each other, and another number of threads sums in another order. Every
# test and every process that a test starts imports this module.
torch.set_num_threads(1)

SHARED = Path(__file__).parents[3] / "shared"
WORDS = (
    "USER : ASSISTANT what is in the image ? a an red blue green square circle . , of and no yes one two boat "
    "describe color shape say it on left right you see there white hello answer question"
).split()
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER : ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ ' ASSISTANT :' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'][0]['text'] + eos_token }}{% endgeneration %}{{ ' ' }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
)


def scale_weights(model, factor: float = 10):
    """Multiply all matrices by a factor. At the default scale every distribution is uniform, which hides errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return fast


def build_processor() -> VTLMMProcessor:
    """28 × 28 pixel images, 4 patches each; a Vicuna-like template."""
    side = {"height": 28, "width": 28}
    image_processor = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
    return VTLMMProcessor(
        image_processor, build_tokenizer(), patch_size=14, num_additional_image_tokens=1, chat_template=TEMPLATE
    )


TEXT_CONFIGS = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
}
VISION_CONFIGS = {
    "clip_vision_model": {"patch_size": 14},
    "siglip_vision_model": {"patch_size": 14},
    "dinov2": {"patch_size": 14},
    "dinov2_with_registers": {"patch_size": 14, "num_register_tokens": 2},
    "convnext": {"image_size": 64, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_stages": 4},
    "mobilenet_v2": {"image_size": 64, "depth_multiplier": 0.25},
}


def build_config(text: str = "llama", vision: str = "clip_vision_model", **kwargs) -> VTLMMConfig:
    """A few thousand parameters; vocabulary of 64 rows, of which the processor's tokenizer uses fewer."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text_config = AutoConfig.for_model(
        text, **size, **TEXT_CONFIGS[text], vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=3
    )
    tower = {} if vision in ("convnext", "mobilenet_v2") else {**size, "hidden_size": 16, "num_hidden_layers": 3}
    if vision.startswith("dinov2"):
        del tower["intermediate_size"]
    vision_config = AutoConfig.for_model(vision, **{**tower, "image_size": 28, **VISION_CONFIGS[vision]})
    num_words = len(WORDS) + 4
    defaults = {"image_token_id": num_words, "visual_vocab_size": num_words, "image_seq_length": 4}
    if vision in ("convnext", "mobilenet_v2"):
        defaults["vision_feature_layer"] = -1
    if vision == "siglip_vision_model":
        defaults["vision_feature_select_strategy"] = "full"
    if vision == "mobilenet_v2":
        defaults["vision_hidden_size"] = 1280
    return VTLMMConfig(text_config=text_config, vision_config=vision_config, **{**defaults, **kwargs})


def random_rows(model, images_per_row: list[int], seed: int = 0, side: int | None = None):
    """Return input_ids, attention_mask and pixel_values of right-padded rows with the given numbers of images."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    id_rows = []
    for number in images_per_row:
        row = torch.randint(4, config.visual_vocab_size, (3,), generator=generator).tolist()
        for _ in range(number):
            row += [config.image_token_id] * config.image_seq_length
            row += torch.randint(4, config.visual_vocab_size, (2,), generator=generator).tolist()
        id_rows.append(row)
    length = max(map(len, id_rows))
    input_ids = torch.tensor([row + [3] * (length - len(row)) for row in id_rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in id_rows])
    side = side or config.vision_config.image_size
    pixel_values = torch.randn(sum(images_per_row), 3, side, side, generator=generator)
    return input_ids, attention_mask, pixel_values if sum(images_per_row) else None
