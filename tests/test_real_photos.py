# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`make real` at toy size: the rows of its splits, its stages, its table, and resuming."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.composition import CHATML, SIZE, tower_folder  # noqa: F401 - a fixture
from helpers.tiny_models import build_tokenizer
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM

from vtlmm.data.rows import load_rows


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_photos.py"
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
def parts(tmp_path_factory, tower_folder) -> Path:  # noqa: F811
    """Return a folder with a tower, a decoder and rows in the formats of the shared data."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "weights").mkdir()
    (folder / "weights/mobilenet_v2").symlink_to(tower_folder("clip"))
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    config = AutoConfig.for_model("llama", **SIZE, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
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
    return folder


@pytest.mark.slow
def test_the_script_runs_and_resumes(parts, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("real_photos", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "HELD_OUT_PHOTOS", 12)
    output = tmp_path / "out"
    command = [str(SCRIPT), str(parts), str(parts / "decoder"), str(output), "--max-steps"]
    monkeypatch.setattr(sys, "argv", [*command, "0"])
    script.main()
    assert (output / "results.md").read_text().count("\n| ") == 2  # the header and the aligned model

    names = ("train", "words", "matching")
    splits = {name: load_rows(str(output / f"{name}.parquet")) for name in names}
    assert [len(rows) for rows in splits.values()] == [40 + 5 * 36, 5 * 12, 12]
    images = {name: {image.tobytes() for [image] in rows["images"]} for name, rows in splits.items()}
    assert not images["train"] & images["words"] | images["train"] & images["matching"]
    assert not images["words"] & images["matching"]

    monkeypatch.setattr(sys, "argv", [*command, "2"])
    script.main()
    table = (output / "results.md").read_text()
    models = ["aligned, not trained", "aligned: decoder", "aligned: joint"]
    models += [f"paper: {stage}" for stage in ("projector", "decoder", "visual_head", "joint")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:9]] == models
    words = [line.split(" | ")[1] for line in table.splitlines()[2:5]]
    assert words[0] == words[1] == words[2]  # a frozen projector keeps the words
    assert float(words[0].split()[0]) > 80
    capsys.readouterr()
    monkeypatch.setattr(script, "measure_caption_words", None)  # everything is measured already
    script.main()
    assert "Every stage is finished" in capsys.readouterr().out
    assert (output / "results.md").read_text() == table
