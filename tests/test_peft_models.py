# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Adapters as PEFT's users make them: PeftModel, peft_config, QLoRA, and methods that are not supported."""

import contextlib
import io
import re

import peft
import pytest
import torch
from helpers.training import build_rows, write_start
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig
from transformers.integrations.peft import MIN_PEFT_VERSION

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor
from vtlmm.train.adapters import DECODER_PROJECTIONS
from vtlmm.train.config import VTLMMTrainingConfig
from vtlmm.train.trainer import VTLMMTrainer


OPTIONS = {"max_steps": 3, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none"}
OPTIONS |= {"disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2, "warmup_steps": 0}
PROJECTIONS = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return write_start(tmp_path_factory.mktemp("peft"))["model_name_or_path"]


def load(folder, **options) -> VTLMMForConditionalGeneration:
    return VTLMMForConditionalGeneration.from_pretrained(folder, **options)


def build(model, tmp_path, folder, peft_config=None, **settings) -> VTLMMTrainer:
    args = VTLMMTrainingConfig(output_dir=str(tmp_path), **{**OPTIONS, **settings})
    processor = VTLMMProcessor.from_pretrained(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        return VTLMMTrainer(
            model, args, train_dataset=build_rows(), processing_class=processor, peft_config=peft_config
        )


def trainable(trainer) -> set[str]:
    return {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 20)[None]).logits


@pytest.mark.slow
def test_a_peft_model_trains_its_adapter_only(folder, tmp_path):
    before = load(folder).state_dict()
    model = get_peft_model(load(folder), LoraConfig(r=2, target_modules=DECODER_PROJECTIONS))
    expected = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = build(model, tmp_path, folder)
    assert trainable(trainer) == expected and all(".lora_" in name for name in expected)
    assert trainer.stage.trains == ("language_model",)
    trainer.train()
    after = {name.replace(".base_layer", ""): p for name, p in trainer.model.get_base_model().state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trainer.save_model()
    reloaded = PeftModel.from_pretrained(load(folder), tmp_path)
    torch.testing.assert_close(logits(reloaded), logits(trainer.model))
    assert not torch.allclose(logits(reloaded), logits(load(folder)))


def test_a_saved_adapter_is_trained_further(folder, tmp_path):
    config = LoraConfig(r=2, target_modules=DECODER_PROJECTIONS, modules_to_save=["lm_head"])
    get_peft_model(load(folder), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        build(PeftModel.from_pretrained(load(folder), tmp_path / "adapter"), tmp_path, folder)
    model = PeftModel.from_pretrained(load(folder), tmp_path / "adapter", is_trainable=True)
    trainer = build(model, tmp_path, folder)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable(trainer) and trainer.stage.trains == ("language_model", "lm_head")


def test_a_peft_model_and_peft_config_together_are_rejected(folder, tmp_path):
    config = LoraConfig(r=2, target_modules=DECODER_PROJECTIONS)
    with pytest.raises(ValueError, match="`model` is a PeftModel already"):
        build(get_peft_model(load(folder), config), tmp_path, folder, peft_config=config)


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "v_proj"]])
def test_target_modules_mean_the_decoder(folder, tmp_path, targets):
    trainer = build(folder, tmp_path, folder, peft_config=LoraConfig(r=2, target_modules=targets))
    names = trainable(trainer)
    assert all(".language_model." in name and ".lora_" in name for name in names)
    assert {name.split(".")[-4] for name in names} == (set(targets) if isinstance(targets, list) else PROJECTIONS)


@pytest.mark.parametrize(
    ("stage", "config", "message"),
    [
        ("visual_head", {}, "trains language_model, but stage visual_head trains vm_head"),
        ("joint", {"modules_to_save": ["multi_modal_projector"]}, "trains multi_modal_projector, but stage joint"),
        ("joint", {"target_modules": r".*vision_tower.*q_proj"}, "outside the decoder"),
    ],
)
def test_an_adapter_must_fit_its_stage(folder, tmp_path, stage, config, message):
    config = LoraConfig(r=2, **{"target_modules": DECODER_PROJECTIONS, **config})
    with pytest.raises(ValueError, match=message):
        build(folder, tmp_path, folder, peft_config=config, stage=stage, vm_head_init="keep")


PROMPT_METHODS = {
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PREFIX_TUNING": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("name", PROMPT_METHODS)
def test_prompt_methods_are_rejected_by_name(folder, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} adds virtual tokens"):
        build(folder, tmp_path, folder, peft_config=PROMPT_METHODS[name])


def test_add_adapter_of_transformers_names_the_version_of_peft(build_model):
    """`model.add_adapter` needs a newer PEFT than VTLMMTrainer."""
    model = build_model()
    config = LoraConfig(r=2, target_modules=["q_proj"])
    if Version(peft.__version__) >= Version(MIN_PEFT_VERSION):
        model.add_adapter(config)
        assert any("lora_A" in name for name, _ in model.named_parameters())
    else:
        with pytest.raises(ValueError, match=re.escape(MIN_PEFT_VERSION)):
            model.add_adapter(config)


def test_an_object_that_is_not_a_peft_config_is_rejected(folder, tmp_path):
    with pytest.raises(ValueError, match="`peft_config` is a dict"):
        build(folder, tmp_path, folder, peft_config={"r": 8})


def test_half_precision_bases_need_mixed_precision_for_modules_to_save(folder, tmp_path):
    config = LoraConfig(r=2, target_modules=DECODER_PROJECTIONS, modules_to_save=["lm_head"])
    model = load(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="needs mixed precision"):
        build(model, tmp_path, folder, peft_config=config, bf16=False)
    trainer = build(load(folder, dtype=torch.float16), tmp_path, folder, peft_config=config, bf16=True)
    assert {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad} == {torch.float32}


# ---- QLoRA ----


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_pefts_qlora_recipe_trains(folder, tmp_path, reentrant, checkpointing):
    """Every LoRA weight gets the gradient that it has without checkpointing."""
    pytest.importorskip("bitsandbytes")
    gradients = {}
    for recipe in (False, True):
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = load(folder, quantization_config=quantization)
        options = {"use_reentrant": reentrant}
        if recipe:
            model = prepare_model_for_kbit_training(
                model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs=options
            )
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=DECODER_PROJECTIONS, init_lora_weights=False, task_type="CAUSAL_LM")
        settings = {"gradient_checkpointing": checkpointing and recipe}
        if settings["gradient_checkpointing"]:
            settings["gradient_checkpointing_kwargs"] = options
        trainer = build(get_peft_model(model, config), tmp_path, folder, **settings)
        batch = trainer.data_collator(list(trainer.train_dataset))
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor([20, 30])).backward()
        gradients[recipe] = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    for name, gradient in gradients[False].items():
        assert gradient.abs().max() > 0, name
        assert gradients[True][name] is not None, name
        torch.testing.assert_close(gradients[True][name], gradient, atol=1e-6, rtol=1e-4)


def test_quantized_models_need_an_adapter(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="quantized model cannot be trained in full"):
        build(load(folder, quantization_config=quantization), tmp_path, folder)
