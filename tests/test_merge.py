# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Merge an adapter into its base: equal outputs, and a folder that loads without this package."""

import json
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from helpers.adapter_settings import ADAPTERS, DECODER_LINEARS, LORA, QLORA, QUANTIZED
from helpers.processes import LOAD, in_clean_process
from helpers.training import write_start
from peft.utils.integrations import dequantize_module_weight
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.cli.main import main
from vtlmm.train.merge import merge_adapter, round_weights
from vtlmm.train.stage_runner import build_trainer, run_training


pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("merging"), vm_head_type="mlp")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("tied"), "qwen2")


def assert_equal_outputs(trainer, merged, tolerance: float = 1e-5):
    batch = trainer.data_collator([trainer.train_dataset[0]])
    batch.pop("labels")
    trainer.model.eval(), merged.eval()
    with torch.no_grad():
        expected, found = (model(**batch, output_visual_logits=True) for model in (trainer.model, merged))
    torch.testing.assert_close(found.logits, expected.logits, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.visual_logits, expected.visual_logits, atol=tolerance, rtol=tolerance)


@pytest.mark.slow
def test_tied_embeddings_stay_one_matrix(tied, tmp_path):
    """LoRA with a head that is the embedding matrix: one trained copy, in the model and in the merged folder."""
    trainer = run_training({**tied, **LORA, "output_dir": str(tmp_path / "adapter")})
    model = trainer.model.get_base_model()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    merged = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert merged.lm_head.weight is merged.get_input_embeddings().weight and merged.config.tie_word_embeddings
    assert_equal_outputs(trainer, merged)


EXTRA = textwrap.dedent(
    """
    from peft import PeftModel
    base = transformers.AutoModelForImageTextToText.from_pretrained(BASE, **trust)
    adapted = PeftModel.from_pretrained(base, ADAPTER)
    for name, folder, adapted in (("adapter", ADAPTER, adapted), ("merged", folder, model)):
        processor = AutoProcessor.from_pretrained(folder, **trust)
        inputs = processor(text=["<image> what"], images=[image], return_tensors="pt")
        found[name] = adapted(**inputs).logits[0, -1].tolist()
    """
)


@pytest.mark.slow
def test_adapter_and_merged_folder_load_without_this_package(settings, tmp_path):
    """From stage II, where LoRA, the projector and the head learn."""
    adapter, merged, again = tmp_path / "adapter", tmp_path / "merged", tmp_path / "again"
    options = {"stage": "decoder", "base_id": "someone/vt-lmm-base", "output_dir": str(adapter)}
    trainer = run_training({**settings, **LORA, **options})
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/vt-lmm-base"
    assert "base_model:\n- someone/vt-lmm-base" in (adapter / "README.md").read_text()
    assert main(["merge", str(adapter), "--output", str(merged), "--base", settings["model_name_or_path"]]) == 0
    assert_equal_outputs(trainer, VTLMMForConditionalGeneration.from_pretrained(merged))
    assert main(["export", str(merged), "--to", "llava", "--output", str(tmp_path / "twin")]) == 0
    twin = LlavaForConditionalGeneration.from_pretrained(tmp_path / "twin").eval()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with torch.no_grad():
        expected, found = (model(**batch).logits for model in (trainer.model, twin))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    code = LOAD.replace('print("FOUND"', EXTRA.replace("BASE", repr(settings["model_name_or_path"])) + 'print("FOUND"')
    cache = tmp_path / "cache"
    cache.mkdir()
    found = in_clean_process(code.replace("ADAPTER", repr(str(adapter))), merged, again, cache=cache)
    generated = [found[name] for name in found if name.startswith("AutoModel")]
    assert len(generated) == 4 and all(ids == generated[0] for ids in generated)
    torch.testing.assert_close(torch.tensor(found["adapter"]), torch.tensor(found["merged"]), atol=1e-5, rtol=1e-5)
    image = Image.new("RGB", (40, 30), (200, 30, 30))
    inputs = trainer.processing_class(text=["<image> what"], images=[image], return_tensors="pt")
    here = trainer.model(**inputs).logits[0, -1]
    torch.testing.assert_close(here, torch.tensor(found["adapter"]), atol=1e-5, rtol=1e-5)


def test_the_card_does_not_name_a_local_base(settings, tmp_path):
    """The Hub refuses a card whose base model is a path."""
    build_trainer({**settings, **LORA, "output_dir": str(tmp_path)}).save_model()
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card and settings["model_name_or_path"] not in card and "base_model" not in card


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"use_pseudo_image_features": True}, {"stage": "visual_head", "vm_head_type": "attention"}]
)
def test_merging_keeps_the_settings_of_the_model(settings, tmp_path, changes):
    """The folder of an adapter has no config of the model, but `vtlmm_adapter.json`."""
    trainer = run_training({**settings, **LORA, **changes, "output_dir": str(tmp_path / "adapter")})
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert_equal_outputs(trainer, VTLMMForConditionalGeneration.from_pretrained(tmp_path / "merged"))


@pytest.mark.slow
def test_stage_four_after_stage_three_on_a_quantized_base(settings, tmp_path, capsys):
    """Stage III, merge, stage IV. A run does not start from an adapter."""
    three, merged, four = tmp_path / "three", tmp_path / "merged", tmp_path / "four"
    run_training({**settings, **QLORA, "stage": "visual_head", "output_dir": str(three)})
    recipe = tmp_path / "recipe.yaml"
    start = {"model_name_or_path": str(three), "output_dir": str(four), "stage": "joint"}
    recipe.write_text(json.dumps({**settings, **QLORA, **start}))
    assert main(["train", "--config", str(recipe)]) == 1
    assert f"`vtlmm merge {three} --output FOLDER`, then set `model_name_or_path: FOLDER`" in capsys.readouterr().err
    assert main(["merge", str(three), "--output", str(merged)]) == 0
    whole, start = (
        load_file(Path(folder, "model.safetensors")) for folder in (merged, settings["model_name_or_path"])
    )
    changed = {name for name in whole if not torch.equal(whole[name], start[name])}
    assert changed and all(name.startswith("model.vm_head.") for name in changed)
    assert main(["train", "--config", str(recipe), "--model_name_or_path", str(merged)]) == 0
    history = json.loads((four / "vtlmm_run.json").read_text())
    assert [entry["stage"] for entry in history] == ["visual_head", "joint"]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_merging_into_the_dequantized_base(settings, tmp_path, adapter):
    """Outputs are equal on the dequantized base and differ on the base in full precision."""
    options = {**QLORA, **ADAPTERS[adapter], "output_dir": str(tmp_path / "adapter")}
    trainer = run_training({**settings, **options})
    for name, flags in {"exact": ["--dequantize"], "near": []}.items():
        assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / name), *flags]) == 0
    assert_equal_outputs(trainer, VTLMMForConditionalGeneration.from_pretrained(tmp_path / "exact"))
    with pytest.raises(AssertionError):
        assert_equal_outputs(trainer, VTLMMForConditionalGeneration.from_pretrained(tmp_path / "near"), 1e-3)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_base_is_rounded_as_it_was_in_training(settings, quantization):
    """Weights in bfloat16 give other 4-bit weights than those in float32."""
    chosen = {**LORA, **QUANTIZED[quantization], "dtype": "bfloat16", "bf16": True}
    model = build_trainer({**settings, **chosen}).model.get_base_model()
    merged = VTLMMForConditionalGeneration.from_pretrained(settings["model_name_or_path"], dtype=torch.float32)
    round_weights(merged, settings["model_name_or_path"], None, quantization, "bfloat16")
    for name in DECODER_LINEARS:
        expected = dequantize_module_weight(model.get_submodule(name).base_layer)
        assert torch.equal(merged.get_submodule(name).weight, expected.float()), name


def test_an_adapter_without_effect_is_refused(settings, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    trainer = build_trainer({**settings, **LORA, "output_dir": str(adapter)})
    trainer.save_model()  # before a step was made
    command = ["merge", str(adapter), "--output", str(tmp_path / "merged")]
    assert main(command) == 1
    assert "15 parts of the adapter" in capsys.readouterr().err
    assert main([*command, "--dequantize"]) == 1
    assert "does not say that the base was quantized" in capsys.readouterr().err
    assert main([*command, "--base", str(tmp_path / "gone")]) == 1
    assert "Set its place with `--base`" in capsys.readouterr().err
    # names of another decoder: PEFT alone would warn, and merge nothing
    path = adapter / "adapter_model.safetensors"
    save_file({name.replace("layers.1.", "layers.7."): t for name, t in load_file(path).items()}, path)
    assert main(command) == 1
    assert "does not fit the model: missing" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("place", ["adapter", "base"])
def test_an_output_that_is_an_input_is_refused(settings, tmp_path, capsys, place):
    trainer = build_trainer({**settings, **LORA, "output_dir": str(tmp_path / "adapter")})
    trainer.save_model()
    base = shutil.copytree(settings["model_name_or_path"], tmp_path / "base")
    before = sorted(path.name for path in (tmp_path / place).iterdir())
    command = ["merge", str(tmp_path / "adapter"), "--base", str(base), "--output", str(tmp_path / place)]
    assert main([*command, "--overwrite"]) == 1
    assert f"is or contains the input '{tmp_path / place}'" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / place).iterdir()) == before
