# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The ONNX export in onnxruntime: the features and visual logits of torch."""

import importlib

import pytest
import torch

from vtlmm.cli.main import main
from vtlmm.hub.export_onnx import export_onnx
from vtlmm.hub.paths import clear_output


pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

CASES = {
    "clip, attention head": ("clip_vision_model", "attention"),
    "siglip, mlp head": ("siglip_vision_model", "mlp"),
    "dinov2 with registers": ("dinov2_with_registers", "linear"),
    "convnext": ("convnext", "linear"),
}


@pytest.mark.parametrize(("tower", "head"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_onnxruntime_computes_the_visual_logits_of_torch(build_model, processor, tmp_path, tower, head):
    model = build_model("llama", tower, vm_head_type=head)
    for name, parameter in model.named_parameters():
        if "residual_block" in name:
            parameter.normal_(0, 0.3)  # its last layer is initialized with zeros
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--to", "onnx", "--output", str(tmp_path / "onnx")]) == 0
    assert {"tokenizer.json", "preprocessor_config.json"} <= {file.name for file in (tmp_path / "onnx").iterdir()}
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "visual_tokens.onnx")
    side = model.config.vision_config.image_size
    for seed in range(2):
        pixel_values = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))
        features, logits = map(torch.from_numpy, session.run(None, {"pixel_values": pixel_values.numpy()}))
        expected = model.model.get_image_features(pixel_values).image_features
        expected_logits = model.model.vm_head(expected)
        for found, wanted in ((features, expected), (logits, expected_logits)):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_weights_in_a_second_file_are_found(build_model, processor, tmp_path, monkeypatch):
    """torch's exporter writes weights above a threshold to a second file, whose name is in the graph."""
    exporter = importlib.import_module("torch.onnx._internal.exporter._onnx_program")
    monkeypatch.setattr(exporter, "_LARGE_MODEL_THRESHOLD", 0)
    model = build_model("llama", "siglip_vision_model")
    model.save_pretrained(tmp_path / "model")
    file = export_onnx(tmp_path / "model", tmp_path / "onnx")
    assert {file.name for file in (tmp_path / "onnx").iterdir()} == {"visual_tokens.onnx", "visual_tokens.onnx.data"}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "onnx"}
    side = model.config.vision_config.image_size
    pixel_values = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    _, logits = onnxruntime.InferenceSession(file).run(None, {"pixel_values": pixel_values.numpy()})
    expected = model.model.vm_head(model.model.get_image_features(pixel_values).image_features)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))
    clear_output(tmp_path / "onnx")
    assert list((tmp_path / "onnx").iterdir()) == []
