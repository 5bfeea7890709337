# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Tiny VT-LMMs with each kind of tokenizer and decoder that the GGUF export supports."""

import json
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, CLIPImageProcessorPil, PreTrainedTokenizerFast, SiglipImageProcessorPil

from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration, VTLMMProcessor
from vtlmm.hub.chat_templates import add_images_and_marks, load_template
from vtlmm.hub.gguf_tokenizer import SPACE, SPLIT
from vtlmm.hub.special_tokens import add_special_tokens

from .tiny_models import VISION_CONFIGS


# Texts of 20 languages and kinds. The tokenizers are trained on them too.
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "It wasn't there; they'd've known. He'll say I'M HERE!",
    "What is in the image?",
    "How many red circles are to the left of the blue square?",
    "yes",
    "No.",
    "a",
    " ",
    "  two spaces",
    "trailing space ",
    "   three   inside   ",
    "tab\tand\ttabs",
    "line\nbreak",
    "two\n\nbreaks",
    "\nat the start",
    "\r\nWindows\r\n",
    "1",
    "12",
    "123",
    "1234567890",
    "3.14159 and 1,000,000.50",
    "2026-11-30T14:22:46Z",
    "1st 2nd 3rd",
    "x=3*y+4",
    "50% off!!!",
    "def f(x):\n    return x ** 2  # square",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }",
    '{"key": [1, 2, {"a": null}]}',
    "<b>bold</b> &amp; <i>it</i>",
    "https://example.org/a?b=c&d=e#f",
    "user@example.org",
    "C:\\Users\\me\\file.txt",
    "snake_case and camelCase",
    "déjà vu, naïve café",
    "Größe, Straße, Übermut",
    "¿Qué hay en la imagen? ¡Un barco!",
    "O que há na imagem? Coração.",
    "Что на картинке? Красный круг.",
    "Що на зображенні? Їжак.",
    "Τι υπάρχει στην εικόνα;",
    "מה יש בתמונה?",
    "ما الذي في الصورة؟",
    "तस्वीर में क्या है?",
    "รูปภาพมีอะไรบ้าง",
    "图片里有什么?红色的圆。",
    "画像には何がありますか?",
    "그림에 무엇이 있습니까?",
    "Trong ảnh có gì?",
    "😀",
    "a 😀 b 👩‍👩‍👧 c 🇩🇪",
    "½ ² ³ ① Ⅳ ٣ ५",
    "“quotes” ‘single’ — dash – en … dots",
    "a b c",
    "zero​width",
    "e\u0301 and é",
    "\u3000ideographic space",
    "ALL CAPS AND lower",
    "MiXeD cAsE wOrDs",
    "supercalifragilisticexpialidocious",
    "the the the the",
    "...",
    "!?!?",
    "((nested) [brackets])",
    "-5 +5 ±5",
    "$12.50 €7 ¥9",
]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA3_ROPE["original_max_position_embeddings"] = 64
SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "max_position_embeddings": 1024}
DECODERS = {
    "llama": ("llama", {}),
    "vicuna": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": 512}),
    "smollm2": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
}


def learn_merges(words: list[list[str]], num_merges: int) -> list[tuple[str, str]]:
    """Return the merges of BPE on words that are lists of symbols. Unlike `tokenizers`, ties have a fixed order."""
    merges = []
    for _ in range(num_merges):
        pairs = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def sentencepiece_tokenizer(prepend_scheme: str = "normalizer") -> PreTrainedTokenizerFast:
    """Return a Llama-like tokenizer: BPE with byte fallback, and as merges all pairs that form a token."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [list(SPACE + word) for text in TEXTS[:45] for word in text.split(" ") if word]
    letters = sorted({letter for word in words for letter in word if letter.isascii() or letter == SPACE})
    learned = ["".join(pair) for pair in learn_merges(words, 200) if set("".join(pair)) <= {*letters}]
    vocabulary = {token: i for i, token in enumerate([*special, *letters, *learned])}
    merges = [
        (token[:i], token[i:])
        for token in learned
        for i in range(1, len(token))
        if token[:i] in vocabulary and token[i:] in vocabulary
    ]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if prepend_scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(special[:3])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_level_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the word split of SmolLM2, Qwen2 or Llama 3, trained on the test's texts."""
    digits = {"qwen2": "", "llama3": "{1,3}"}
    if kind == "smollm2":
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        regex = Regex(SPLIT.replace("DIGITS", digits[kind]))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = [pre_tokenizers.Split(regex, behavior="isolated"), byte_level]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pre_tokenizer = pre_tokenizers.Sequence(split)
    words = [list(word) for text in TEXTS for word, _ in pre_tokenizer.pre_tokenize_str(text)]
    merges = learn_merges(words, 240)
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if kind == "llama3":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    if kind != "qwen2":
        names["bos_token"] = "<|endoftext|>" if kind == "llama3" else "<|im_start|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def build_gguf_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of one of DECODERS with its chat template."""
    if kind in ("llama", "mistral", "vicuna"):
        tokenizer = sentencepiece_tokenizer("first" if kind == "vicuna" else "normalizer")
        tokenizer.chat_template = load_template("mistral" if kind == "mistral" else "vicuna_v1")
    else:
        tokenizer = byte_level_tokenizer(kind)
        tokenizer.chat_template = CHATML
        tokenizer.chat_template = add_images_and_marks(CHATML, tokenizer)
    return tokenizer


def build_vision(tower: str):
    """Return config and image processor of a small tower for images of 56 × 56 pixels, 16 patches."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(tower, **size, image_size=56, **VISION_CONFIGS[tower])
    side = {"height": 56, "width": 56}
    if tower == "siglip_vision_model":
        return config, SiglipImageProcessorPil(size=side)
    return config, CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)


def write_gguf_source(folder: Path, kind: str, tower: str = "siglip_vision_model", **values) -> Path:
    """Write a VT-LMM with random weights, and the decoder `kind` of DECODERS, into `folder`."""
    tokenizer = build_gguf_tokenizer(kind)
    vocabulary = add_special_tokens(tokenizer, len(tokenizer) + 3)
    vision_config, image_processor = build_vision(tower)
    model_type, sizes = DECODERS[kind]
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    num_words = vocabulary.num_words
    num_rows = num_words + (3 if model_type == "qwen2" else 0)  # of the others, the image token has no row
    text_config = AutoConfig.for_model(
        model_type, **{**SIZE, **sizes}, vocab_size=num_rows, pad_token_id=tokenizer.pad_token_id, **special
    )
    strategy = "default" if tower == "clip_vision_model" else "full"
    config = VTLMMConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=vocabulary.image_token_id,
        visual_vocab_size=num_words,
        image_seq_length=16,
        **{"vision_feature_select_strategy": strategy, **values},
    )
    torch.manual_seed(0)
    model = VTLMMForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(8) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
            if "vision_tower" in name and parameter.ndim > 1:
                parameter.div_(2)
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            weight[num_words:] = weight[:num_words].mean(
                0
            )  # as `compose` initializes rows, so they are never generated
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder, max_shard_size="200KB")
    VTLMMProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return folder


def patch_json(file: Path, change) -> None:
    """Apply `change` to the content of a JSON file."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
