# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""One step of TRL's preference and reinforcement trainers, which load a reference model with `attn_implementation`."""

import pytest
import torch
from datasets import Dataset
from helpers.tiny_models import TEMPLATE, build_processor
from PIL import Image
from transformers import CLIPImageProcessorPil
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor


pytestmark = pytest.mark.slow

SETTINGS = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.1, "report_to": "none"}
SETTINGS |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "beta": 0.1}
GENERATION = {"num_generations": 2, "max_completion_length": 4}


def reward_word_count(completions, **kwargs) -> list[float]:
    """Return different rewards for the completions of a prompt, so that the advantages are not 0."""
    return [float(i + len(str(completion))) for i, completion in enumerate(completions)]


TRAINERS = {
    "DPO": (DPOTrainer, DPOConfig, {}, {}),
    "KTO": (KTOTrainer, KTOConfig, {}, {}),
    "GRPO": (GRPOTrainer, GRPOConfig, GENERATION, {"reward_funcs": reward_word_count}),
    "RLOO": (RLOOTrainer, RLOOConfig, GENERATION, {"reward_funcs": reward_word_count}),
}


def build_dataset(trainer: str) -> Dataset:
    """Return four rows with one image each, in the format of the trainer."""

    def say(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    rows = []
    for i, color in enumerate(["red", "green", "blue", "red"]):
        row = {"images": [Image.new("RGB", (40, 30), color)], "prompt": say("user", "what is it ?")}
        if trainer == "DPO":
            row |= {"chosen": say("assistant", f"a {color} boat"), "rejected": say("assistant", "no")}
        if trainer == "KTO":
            row |= {"completion": say("assistant", f"a {color} boat"), "label": i % 2 == 0}
        rows.append(row)
    return Dataset.from_list(rows)


def build_convnext_processor() -> VTLMMProcessor:
    """Return a processor for images of 64 × 64 pixels with a total stride of 32, so with 4 image tokens."""
    image_processor = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    return VTLMMProcessor(image_processor, build_processor().tokenizer, 32, "full", chat_template=TEMPLATE)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("vision", ["clip_vision_model", "convnext"])
def test_one_step_of_a_trl_trainer(build_model, tmp_path, trainer, vision):
    build_model(vision=vision).save_pretrained(tmp_path / "model")
    model = VTLMMForConditionalGeneration.from_pretrained(tmp_path / "model")
    processor = build_processor() if vision == "clip_vision_model" else build_convnext_processor()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer_class, config_class, settings, arguments = TRAINERS[trainer]
    run = trainer_class(
        model=model,
        args=config_class(output_dir=str(tmp_path / "out"), **SETTINGS, **settings),
        train_dataset=build_dataset(trainer),
        processing_class=processor,
        **arguments,
    )
    run.train()
    assert run.ref_model is not None and run.state.global_step == 1
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any("language_model" in name for name in moved) and any("multi_modal_projector" in name for name in moved)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
