# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`load_model`: quantized, offloaded, compiled, exported and adapter models, and folders without a model."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.inference import QUESTION, expected_answer, loaded, model_and_processor, work  # noqa: F401 - fixtures
from helpers.training import write_start
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, CompileConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.cli.main import main
from vtlmm.hub.export_llava import export_to_llava
from vtlmm.hub.repository import list_published_files
from vtlmm.hub.weights_digest import weights_digest
from vtlmm.inference.generation import answer_batch, generate
from vtlmm.inference.loading import load_model
from vtlmm.train.merge import merge_adapter
from vtlmm.train.stage_runner import run_training


@pytest.mark.parametrize(("option", "kind"), [("load_in_4bit", "Linear4bit"), ("load_in_8bit", "Linear8bitLt")])
def test_quantized_decoder_has_similar_logits(work, model_and_processor, option, kind):
    model, processor = loaded(work, **{option: True})
    quantized = {name for name, module in model.named_modules() if type(module).__name__ == kind}
    assert len(quantized) == 14 and all(name.startswith("model.language_model.layers.") for name in quantized)
    inputs = processor(PILImage.new("RGB", (28, 28), "red"), "USER : <image> what ASSISTANT :", return_tensors="pt")
    with torch.no_grad():
        found, expected = (m(**inputs).logits.float() for m in (model, model_and_processor[0]))
    similarity = torch.cosine_similarity(found, expected, dim=-1).mean()
    assert 0.9 < similarity < 0.99999
    [answer] = answer_batch(model, processor, [{"images": [], "question": QUESTION}], 3)
    assert len(answer.split()) == 3


@torch.no_grad()
def test_offloaded_model_computes_the_same(work, model_and_processor, tmp_path):
    """With `device_map="auto"` and little memory, some layers are read from the disk when they run."""
    whole, processor = model_and_processor
    model = VTLMMForConditionalGeneration.from_pretrained(
        work / "model", device_map="auto", max_memory={"cpu": "150KB"}, offload_folder=tmp_path
    )
    assert {"cpu", "disk"} <= set(model.hf_device_map.values())
    assert any(".layers." in name for name in model.hf_device_map)
    assert weights_digest(model) == weights_digest(whole)  # it identifies the model of a run
    inputs = processor(PILImage.new("RGB", (28, 28), "red"), "USER : <image> what ASSISTANT :", return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits, whole(**inputs).logits)
    settings = {"max_new_tokens": 4}
    assert torch.equal(model.generate(**inputs, **settings), whole.generate(**inputs, **settings))


def test_load_options_reach_the_model(work):
    model, _ = loaded(work, device_map="cpu", dtype="bfloat16", use_pseudo_image_features=True)
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu" and model.config.use_pseudo_image_features


@pytest.mark.slow
def test_compiled_generation_with_a_static_cache(model_and_processor, monkeypatch):
    """transformers compiles on a GPU only. The test enables it on the CPU."""
    model, processor = model_and_processor
    graphs = []

    def count_graphs(graph, inputs):
        graphs.append(graph)
        return graph

    compilation = CompileConfig(fullgraph=True, backend=count_graphs, mode=None)
    compilation._compile_all_devices = True
    inputs = processor(PILImage.new("RGB", (28, 28), "red"), "USER : <image> what ASSISTANT :", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=8)
    found = model.generate(**inputs, max_new_tokens=8, cache_implementation="static", compile_config=compilation)
    assert torch.equal(found, expected) and len(set(found[0, -8:].tolist())) > 2
    assert 1 <= len(graphs) <= 2  # not one for each step


def test_custom_attention_runs_in_every_layer(work, model_and_processor):
    """`_supports_attention_backend` holds for the tower and the decoder."""
    whole, processor = model_and_processor
    called = []

    def attention(module, *args, **kwargs):
        called.append(module)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("engine", attention)
    AttentionMaskInterface.register("engine", sdpa_mask)
    model, _ = loaded(work)
    model.set_attn_implementation("engine")
    inputs = processor(PILImage.new("RGB", (28, 28), "red"), "USER : <image> what ASSISTANT :", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, whole(**inputs).logits)
    # the tower's last layer does not run: its states are not used
    assert len(called) == len(set(called)) == 2 + 2 and model._supports_attention_backend


def test_exported_llava_answers_alike_without_visual_tokens(work, model_and_processor, tmp_path, capfd, monkeypatch):
    export_to_llava(work / "model", tmp_path / "llava")
    asked = [str(work / "red.png"), QUESTION, "--max-new-tokens", "6"]
    assert main(["ask", str(tmp_path / "llava"), *asked]) == 0
    assert capfd.readouterr().out == expected_answer(*model_and_processor, QUESTION, "red", folder=work) + "\n"
    assert main(["ask", str(tmp_path / "llava"), *asked, "--use-pseudo-image-features"]) == 1
    assert "llava model without a VM head" in capfd.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("/words\n"))
    assert main(["chat", str(tmp_path / "llava"), "--image", str(work / "red.png")]) == 0
    assert "This model is a llava without a VM head" in capfd.readouterr().out
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"image": str(work / "red.png"), "question": QUESTION, "answer": "red"}]))
    for command in (["tokens", str(tmp_path / "llava"), str(work / "red.png")], ["analyze", str(tmp_path / "llava")]):
        command += ["--dataset", str(rows)] if command[0] == "analyze" else []
        assert main(command) == 1 and "llava model without a VM head" in capfd.readouterr().err

    weights = load_file(tmp_path / "llava" / "model.safetensors")
    del weights["multi_modal_projector.linear_1.bias"]
    save_file(weights, tmp_path / "llava" / "model.safetensors", {"format": "pt"})
    assert main(["ask", str(tmp_path / "llava"), *asked]) == 1
    assert "1 missing tensors" in (error := capfd.readouterr().err) and "multi_modal_projector.linear_1.bias" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"), [("vm_head_type", "mlp"), ("use_pseudo_image_features", True), ("vm_head_type", None)]
)
def test_published_adapter_keeps_the_settings_of_its_model(tmp_path, name, value):
    """The run record, which has local paths, is not published."""
    run_training(write_start(tmp_path) | {"use_peft": True, "lora_r": 4, "stage": "visual_head", name: value})
    published = tmp_path / "published"
    published.mkdir()
    for file in list_published_files(tmp_path / "out"):
        shutil.copy(tmp_path / "out" / file, published)
    assert not (published / "vtlmm_run.json").exists()
    merged = merge_adapter(tmp_path / "out")
    for folder in (tmp_path / "out", published):
        model, processor = load_model(folder, dtype="float32")
        inputs = processor(
            PILImage.new("RGB", (28, 28), "red"), "USER : <image> what ASSISTANT :", return_tensors="pt"
        )
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, merged(**inputs).logits, rtol=1e-4, atol=1e-4)
        assert getattr(model.config, name) == (value or "linear")
    for damage in ("[]", '{"vm_head_type": 3}', "{"):
        (published / "vtlmm_adapter.json").write_text(damage)
        with pytest.raises(ValueError, match="vtlmm_adapter.json"):
            load_model(published)


def test_adapter_folder_is_loaded_with_its_base(tmp_path):
    run_training(
        write_start(tmp_path) | {"use_peft": True, "lora_r": 4, "stage": "visual_head", "vm_head_type": "mlp"}
    )
    merged = merge_adapter(tmp_path / "out")
    model, processor = load_model(tmp_path / "out", dtype="float32")
    inputs = processor(PILImage.new("RGB", (28, 28), "red"), "USER : <image> what ASSISTANT :", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, merged(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert model.config.vm_head_type == "mlp"
    assert main(["ask", str(tmp_path / "out"), "what is it", "--max-new-tokens", "2"]) == 0
    quantized, _ = load_model(tmp_path / "out", load_in_4bit=True)
    assert len(generate(quantized, processor, "what is it", max_new_tokens=2)) == 1
    shutil.move(tmp_path / "start", tmp_path / "moved")
    with pytest.raises(ValueError, match="is an adapter, and its base model .* was not found"):
        load_model(tmp_path / "out")


def test_missing_folder_is_not_looked_up_on_the_hub(work, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *args, **kwargs: pytest.fail("looked up"))
    monkeypatch.chdir(work.parent)
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c", f"{work.name}/nowhere", "nowhere/", Path("nowhere")):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_model(name)
    with pytest.raises(ValueError, match=f"has no config.json .*Did you mean {work / 'model'}"):
        load_model(work)
    with pytest.raises(NotADirectoryError, match="is a file"):
        load_model(work / "red.png")
