# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A folder of weights and photos in the formats of the shared data, for the tests of benchmarks."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM

from .composition import CHATML, SIZE
from .tiny_models import build_tokenizer


# Wide enough for nf4's blocks of 64
WIDE = {**SIZE, "hidden_size": 64, "intermediate_size": 128}
COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30), "white": (235, 235, 235)}


def photo(seed: int) -> tuple[str, bytes]:
    """Return a color and a noisy image of it."""
    generator = np.random.default_rng(seed)
    word = list(COLORS)[seed % 4]
    pixels = np.array(COLORS[word]) + generator.normal(0, 25, size=(28, 28, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return word, file.getvalue()


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tower_folder) -> Path:
    """Return a folder with a tower, a decoder and rows in the formats of the shared data."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "weights").mkdir()
    for name in ("mobilenet_v2", "dinov2_small"):
        (folder / "weights" / name).symlink_to(tower_folder("clip"))
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    config = AutoConfig.for_model("llama", **WIDE, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "decoder")
    tokenizer.save_pretrained(folder / "decoder")
    rows = []
    for number in range(60):
        word, content = photo(number)
        captions = [f"a {word} {noun}" for noun in ("square", "circle", "boat", "image", "color")]
        rows.append({"id": number, "image": {"path": f"{number}.png", "bytes": content}, "captions": captions})
    (folder / "data/flickr8k_700").mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(folder / "data/flickr8k_700/flickr8k_700.parquet")
    images = folder / "data/llava_pretrain_2k/images"
    images.mkdir(parents=True)
    chats = []
    for number in range(100, 140):
        word, content = photo(number)
        (images / f"{number}.png").write_bytes(content)
        turns = [{"from": "human", "value": "<image>\nwhat is it ?"}, {"from": "gpt", "value": f"a {word} square"}]
        chats.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (images.parent / "chat.json").write_text(json.dumps(chats))
    (folder / "data/piqa").mkdir()
    text = {"goal": "what is it ?", "sol1": "a red\nsquare", "sol2": "a blue circle", "label": 0}
    (folder / "data/piqa/validation.jsonl").write_text(json.dumps(text) + "\n")
    return folder
