# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A tiny training run for the tests and their subprocesses."""

import contextlib
import io
import json
from pathlib import Path

import torch
from datasets import Dataset, Image
from datasets import List as ListFeature
from PIL import Image as PILImage

from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration
from vtlmm.train.adapters import AdapterConfig, peft_config
from vtlmm.train.config import VTLMMTrainingConfig
from vtlmm.train.trainer import VTLMMTrainer

from .tiny_models import WORDS, build_config, build_processor, scale_weights


IMAGES_PER_ROW = (1, 0, 2, 1, 0, 3, 1, 1)


def build_rows(images_per_row=IMAGES_PER_ROW, seed: int = 0) -> Dataset:
    """Return conversations of different lengths, with different numbers of images of random colors."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in images_per_row:
        length = int(torch.randint(1, 6, (1,), generator=generator))
        words = [WORDS[int(i)] for i in torch.randint(4, len(WORDS), (2 * length,), generator=generator)]
        colors = torch.randint(0, 256, (number, 3), generator=generator).tolist()
        images = [PILImage.new("RGB", (28, 28), tuple(color)) for color in colors]
        question = [{"type": "image", "text": None}] * number + [{"type": "text", "text": " ".join(words[:length])}]
        answer = [{"type": "text", "text": " ".join(words[length:])}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": images, "num_context_messages": 0})
    return Dataset.from_list(rows).cast_column("images", ListFeature(Image()))


def build_trainer(
    output_dir: Path,
    rows: Dataset | None = None,
    model_options: dict | None = None,
    eval_dataset: Dataset | None = None,
    adapter: AdapterConfig | None = None,
    **settings,
):
    """Return a trainer for a tiny random model, with SGD, so that one step shows the gradient."""
    torch.manual_seed(0)
    model = VTLMMForConditionalGeneration(build_config(**(model_options or {})))
    scale_weights(model, 5)
    model.initialize_vm_head("random")
    defaults = {
        "optim": "sgd",
        "learning_rate": 10.0,  # a large step, so that the update is larger than the rounding of the weights
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "vm_head_init": "keep",
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = VTLMMTrainingConfig(output_dir=str(output_dir), **{**defaults, **settings})
    with contextlib.redirect_stdout(io.StringIO()):
        return VTLMMTrainer(
            model=model,
            args=args,
            train_dataset=build_rows() if rows is None else rows,
            eval_dataset=eval_dataset,
            processing_class=build_processor(),
            peft_config=None if adapter is None else peft_config(adapter, args.resolved_stage()),
        )


def weights(model) -> dict[str, torch.Tensor]:
    """Return a copy of all weights."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def write_start(folder: Path, text: str = "llama", vision: str = "clip_vision_model", **options) -> dict:
    """Write a tiny model, wide enough for nf4's blocks of 64, and rows; return the settings of a run."""
    torch.manual_seed(0)
    config = build_config(text, vision, **options).to_dict()
    config["text_config"].update(hidden_size=64, intermediate_size=128, head_dim=16)
    model = VTLMMForConditionalGeneration(VTLMMConfig(**config))
    scale_weights(model, 5)
    model.save_pretrained(folder / "start")
    processor = build_processor()
    if config["vision_feature_select_strategy"] == "full":  # no CLS position
        processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    processor.save_pretrained(folder / "start")
    PILImage.new("RGB", (28, 28), (200, 30, 30)).save(folder / "red.png")
    talk = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "red boat"}]
    silent = [{"from": "human", "value": "say hello"}, {"from": "gpt", "value": "hello . hello"}]
    rows = [{"image": "red.png", "conversations": talk}, {"conversations": silent}] * 3
    (folder / "rows.json").write_text(json.dumps(rows))
    data = {
        "model_name_or_path": str(folder / "start"),
        "dataset_name": str(folder / "rows.json"),
        "image_folder": str(folder),
    }
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    steps = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "check_data": False}
    return {**data, **quiet, **steps, "output_dir": str(folder / "out")}


def update(trainer) -> dict[str, torch.Tensor]:
    """Return the change of each parameter in one optimizer step."""
    before = weights(trainer.model)
    trainer.train()
    return {name: tensor - before[name] for name, tensor in weights(trainer.model).items()}


def assert_same_update(found: dict, expected: dict, tolerance: float = 1e-6):
    """Check the relative difference of the whole update, and that the same parameters change."""
    assert found.keys() == expected.keys()
    difference = sum((found[name] - expected[name]).double().square().sum() for name in expected).sqrt()
    size = sum(tensor.double().square().sum() for tensor in expected.values()).sqrt()
    assert size > 1e-3 and difference / size < tolerance, (difference / size).item()
