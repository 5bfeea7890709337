# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The model with attention implementations, torch.compile, device maps and offloading."""

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights, load_checkpoint_and_dispatch
from helpers.tiny_models import build_config, random_rows

from modeling_vtlmm import VTLMMForConditionalGeneration


FLEX_ATTENTION = pytest.param("flex_attention", marks=pytest.mark.slow)  # it is compiled


@pytest.mark.slow
@torch.no_grad()  # flex attention has no backward on CPU
@pytest.mark.parametrize("implementation", ["eager", "sdpa", FLEX_ATTENTION])
def test_attention_implementations_agree(build_model, implementation):
    model = build_model()
    input_ids, attention_mask, pixel_values = random_rows(model, [1, 2])
    expected = model(input_ids, pixel_values, attention_mask).logits
    model.model.language_model.set_attn_implementation(implementation)
    found = model(input_ids, pixel_values, attention_mask).logits
    used = attention_mask.bool()
    torch.testing.assert_close(found[used], expected[used], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_compiled_forward_equals_eager(build_model):
    model = build_model()
    input_ids, attention_mask, pixel_values = random_rows(model, [1, 2])
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(
        compiled(input_ids, pixel_values, attention_mask).logits, model(input_ids, pixel_values, attention_mask).logits
    )


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("pseudo", [False, True], ids=["image features", "pseudo image features"])
def test_prefill_compiles_without_graph_breaks(build_model, pseudo):
    model = build_model(use_pseudo_image_features=pseudo)
    input_ids, attention_mask, pixel_values = random_rows(model, [1, 2])
    expected = model(input_ids, pixel_values, attention_mask).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids, pixel_values, attention_mask).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["convnext", "mobilenet_v2", "clip_vision_model"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_towers_accept_an_attention_implementation(build_model, tmp_path, vision, implementation):
    """A convolutional tower has no attention, so the setting applies to the decoder only."""
    build_model(vision=vision).save_pretrained(tmp_path)
    loaded = VTLMMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
    changed = VTLMMForConditionalGeneration.from_pretrained(tmp_path)
    changed.set_attn_implementation(implementation)
    for model in (loaded, changed):
        assert model.config._attn_implementation == implementation
        assert model.model.language_model.config._attn_implementation == implementation
        is_convolutional = vision != "clip_vision_model"
        expected = "eager" if is_convolutional else implementation
        assert model.model.vision_tower.config._attn_implementation == expected


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("vm_head_type", ["linear", "attention"])
@pytest.mark.parametrize("text", ["llama", "qwen2"])  # untied and tied embeddings
def test_pseudo_image_features_work_with_offloading(build_model, tmp_path, text, vm_head_type):
    model = build_model(text, use_pseudo_image_features=True, vm_head_type=vm_head_type)
    input_ids, attention_mask, pixel_values = random_rows(model, [1, 2])
    expected = model(input_ids, pixel_values, attention_mask).logits
    tokens = model.get_visual_tokens(pixel_values).token_ids
    model.save_pretrained(tmp_path / "model")
    config = model.config

    on_disk = VTLMMForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        device_map={"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "model.vm_head": "disk"}
        | {"model.language_model": "disk", "lm_head": "disk"},
        offload_folder=tmp_path / "offload",
    )
    with init_empty_weights():
        empty = VTLMMForConditionalGeneration(config)
    empty.tie_weights()
    dispatched = load_checkpoint_and_dispatch(empty.eval(), tmp_path / "model", device_map={"": "cpu"})
    on_cpu = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "model")
    cpu_offload(on_cpu, execution_device=torch.device("cpu"))
    for offloaded in (on_disk, dispatched, on_cpu):
        torch.testing.assert_close(offloaded(input_ids, pixel_values, attention_mask).logits, expected)
        assert torch.equal(offloaded.get_visual_tokens(pixel_values).token_ids, tokens)
    assert on_cpu.model.vm_head.weight.is_meta, "the weight stays offloaded"


def test_pseudo_image_features_work_on_meta_tensors():
    with init_empty_weights(include_buffers=True):
        model = VTLMMForConditionalGeneration(build_config(use_pseudo_image_features=True))
    features = model.get_image_features(torch.randn(2, 3, 28, 28, device="meta"))
    assert [tuple(image.shape) for image in features.pooler_output] == [(4, 32)] * 2
