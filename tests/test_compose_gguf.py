# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Compose a VT-LMM from a decoder in a GGUF file, which transformers reads."""

import pytest
import torch
from helpers.gguf_models import TEXTS, build_vision, write_gguf_source
from transformers import SiglipVisionModel

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor


pytest.importorskip("gguf")

from vtlmm.hub.compose import compose_model  # noqa: E402
from vtlmm.hub.export_gguf import export_gguf  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@torch.no_grad()
def test_a_model_composed_from_a_gguf_decoder_has_its_logits(tmp_path, kind):
    """The saved model is loaded again: it is an ordinary model, not a quantized one."""
    source = write_gguf_source(tmp_path / "source", kind)
    decoder = export_gguf(source, tmp_path / "gguf", "f32").model
    vision_config, image_processor = build_vision("siglip_vision_model")
    SiglipVisionModel(vision_config).save_pretrained(tmp_path / "tower")
    image_processor.save_pretrained(tmp_path / "tower")
    compose_model(str(tmp_path / "tower"), str(decoder), tmp_path / "composed")
    model = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "composed").eval()
    processor = VTLMMProcessor.from_pretrained(tmp_path / "composed")
    expected = VTLMMForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    num_words = expected.config.visual_vocab_size
    input_ids = torch.arange(40)[None] * 7 % num_words
    found = model(input_ids).logits[..., :num_words]
    torch.testing.assert_close(found, expected(input_ids).logits[..., :num_words], rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in model.config.to_dict()["text_config"]
    tokenizer = VTLMMProcessor.from_pretrained(source).tokenizer
    for text in (TEXTS[0], TEXTS[2], TEXTS[33]):
        assert processor.tokenizer(text).input_ids == tokenizer(text).input_ids
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompts = [
        part.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        for part in (processor, tokenizer)
    ]
    assert prompts[0] == prompts[1]
    with pytest.raises(FileNotFoundError, match="missing.gguf' does not exist"):
        compose_model(str(tmp_path / "tower"), str(tmp_path / "gguf" / "missing.gguf"))
