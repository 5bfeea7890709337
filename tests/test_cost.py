# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The estimate of FLOPs and time, against torch's own count of a training step."""

import pytest
import torch
from conftest import build_config
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.train.config import VTLMMTrainingConfig
from vtlmm.train.cost import estimate_cost, flops_per_token, measure_speed
from vtlmm.train.stages import STAGES, set_trainable


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", list(STAGES.values()), ids=list(STAGES))
def test_flops_are_those_of_a_step(stage, tied):
    """torch counts attention and the projector too, which are small here."""
    config = build_config()
    config.text_config.hidden_size, config.text_config.intermediate_size = 128, 1024
    config.text_config.tie_word_embeddings = tied
    model = VTLMMForConditionalGeneration(config)
    set_trainable(model, stage)
    ids = torch.randint(5, 30, (2, 24))
    ids[:, 2:6] = config.image_token_id
    inputs = {"input_ids": ids, "labels": ids, "vision_features": torch.randn(2, 4, config.vision_feature_size)}
    with FlopCounterMode(display=False) as counter:
        sums = model(**inputs, return_loss_sums=True, visual_student=stage.visual_student).loss_sums
        loss = stage.lm_loss_coef * sums["lm_loss"]
        if stage.visual_student:
            loss = loss + stage.visual_loss_coef * sums["visual_loss"]
        loss.backward()
    assert flops_per_token(model, stage) * ids.numel() == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_steps_rows_and_time(build_model, tmp_path):
    build_model().save_pretrained(tmp_path)
    settings = {"output_dir": str(tmp_path / "out"), "stage": "projector", "use_cpu": True, "report_to": "none"}
    args = VTLMMTrainingConfig(**settings, per_device_train_batch_size=2, num_train_epochs=2)
    epochs = estimate_cost(str(tmp_path), args, [10, 20, 30], flops_per_second=1e9)
    assert (epochs.num_steps, epochs.num_rows, epochs.tokens_per_row) == (4, 6, 20)
    assert epochs.seconds == pytest.approx(epochs.flops / 1e9)
    args = VTLMMTrainingConfig(**settings, per_device_train_batch_size=2, max_steps=5, gradient_accumulation_steps=4)
    steps = estimate_cost(str(tmp_path), args, [10, 20, 30], flops_per_second=1e9, num_processes=2)
    assert (steps.num_steps, steps.num_rows) == (5, 80)
    assert steps.flops / epochs.flops == pytest.approx(80 / 6)
    assert steps.seconds == pytest.approx(steps.flops / 2e9)
    assert "5 steps, 80 rows of 20 tokens" in steps.format("projector")


def test_an_adapter_trains_no_weight_of_the_decoder():
    """torch counts the small matrices of LoRA too."""
    config = build_config()
    config.text_config.hidden_size, config.text_config.intermediate_size = 128, 1024
    model = VTLMMForConditionalGeneration(config)
    lora = LoraConfig(r=1, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    peft_model = get_peft_model(model, lora)
    ids = torch.randint(5, 30, (2, 24))
    with FlopCounterMode(display=False) as counter:
        peft_model(input_ids=ids, labels=ids, return_loss_sums=True).loss_sums["lm_loss"].backward()
    expected = flops_per_token(VTLMMForConditionalGeneration(config), STAGES["decoder"], use_adapter=True)
    assert expected * ids.numel() == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert flops_per_token(VTLMMForConditionalGeneration(config), STAGES["decoder"]) > 1.3 * expected


def test_packed_rows_are_counted_as_packs(build_model, tmp_path):
    build_model().save_pretrained(tmp_path)
    settings = {"output_dir": str(tmp_path / "out"), "stage": "decoder", "use_cpu": True, "report_to": "none"}
    args = VTLMMTrainingConfig(**settings, packing=True, max_length=40, per_device_train_batch_size=1)
    packed = estimate_cost(str(tmp_path), args, [10, 20, 30, 20], flops_per_second=1e9)
    assert (packed.num_steps, packed.num_rows, packed.tokens_per_row) == (6, 6, 40)  # two packs, three epochs


def test_speed_is_positive():
    assert measure_speed(torch.device("cpu"), torch.float32) > 1e8
