# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The data check reads a model's texts without torch, and counts the same tokens as the whole processor."""

import json
import subprocess
import sys

import pytest
from helpers.tiny_models import build_config, build_processor
from PIL import Image
from transformers import AutoProcessor, BitImageProcessorPil, SiglipImageProcessorPil

from vtlmm.data.encoding import control_tokens, encode_conversation
from vtlmm.data.row_checker import image_tokens_per_image
from vtlmm.data.text_processor import load_text_processor


CHAT = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what ?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a red square"}]},
]
COMMAND = """
import sys
from vtlmm.cli.main import main
code = main(["data", "check", "--model", sys.argv[1], "--dataset", sys.argv[2]])
print("modules", [name for name in ("torch", "trl", "accelerate", "peft") if name in sys.modules])
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path):
    build_config().save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("image_processor", [None, BitImageProcessorPil, SiglipImageProcessorPil])
def test_texts_are_encoded_like_the_whole_processor(folder, image_processor):
    if image_processor is not None:
        processor = build_processor()
        processor.image_processor = image_processor(
            size={"height": 42, "width": 28}, crop_size={"height": 28, "width": 14}
        )
        processor.save_pretrained(folder)
    processor, (text, max_positions) = AutoProcessor.from_pretrained(folder), load_text_processor(folder)
    assert max_positions == build_config().text_config.max_position_embeddings
    assert text.tokens_per_image == image_tokens_per_image(text) == image_tokens_per_image(processor)
    assert (text.image_token_id, text.image_token) == (processor.image_token_id, processor.image_token)
    assert text.chat_template == processor.chat_template and control_tokens(text) == control_tokens(processor)
    assert text.tokenizer.special_tokens_map == processor.tokenizer.special_tokens_map
    for one, other in zip(encode_conversation(text, CHAT), encode_conversation(processor, CHAT), strict=True):
        assert one.tolist() == other.tolist()


def test_other_folders_need_the_whole_processor(folder, tmp_path):
    assert load_text_processor("user/name") is None and load_text_processor(tmp_path) is None
    settings = json.loads((folder / "processor_config.json").read_text())
    for change in (
        {"processor_class": "LlavaProcessor"},
        {"image_processor": {**settings["image_processor"], "size": {"shortest_edge": 28}}},
        {"image_processor": {**settings["image_processor"], "image_processor_type": "ConvNextImageProcessor"}},
        {"patch_size": None},
    ):
        (folder / "processor_config.json").write_text(json.dumps({**settings, **change}))
        assert load_text_processor(folder) is None
    (folder / "processor_config.json").write_text(json.dumps(settings))
    assert load_text_processor(folder) is not None
    (folder / "adapter_config.json").write_text("{}")
    assert load_text_processor(folder) is None


@pytest.mark.slow
def test_the_command_imports_no_torch(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image> what ?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": i, "image": "a.png", "conversations": turns} for i in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, "-c", COMMAND, str(folder), str(tmp_path / "rows.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "problems    none" in result.stdout, result.stderr
    assert "modules []" in result.stdout


@pytest.mark.slow
def test_answers_need_no_datasets():
    modules = "vtlmm.cli.ask, vtlmm.inference.generation, vtlmm.inference.loading"
    code = f"import sys, {modules}; sys.exit(any(name in sys.modules for name in ('datasets', 'trl', 'peft')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
