# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A tiny grid of trainings, its data and its results. Test files import the fixtures."""

import json
import random

import pytest
import torch
import yaml
from PIL import Image as PILImage

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.ablations.grid import METRICS

from .tiny_models import WORDS, build_config, build_processor, scale_weights


# Caption matching needs one row per image
ALL_BUT_OOD = [metric for metric in METRICS if metric != "ood" and not metric.endswith("caption_matching")]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with training rows, questions and a tiny model whose large weights make answers depend on the image."""
    folder = tmp_path_factory.mktemp("ablate")
    torch.manual_seed(0)
    model = VTLMMForConditionalGeneration(build_config())
    scale_weights(model)
    model.save_pretrained(folder / "start")
    build_processor().save_pretrained(folder / "start")
    rng = random.Random(0)
    rows = []
    for i in range(8):
        PILImage.new("RGB", (28, 28), tuple(rng.randrange(256) for _ in range(3))).save(folder / f"{i}.png")
        texts = {"question": " ".join(rng.choices(WORDS, k=1 + i % 4)), "answer": rng.choice(["red", "blue"])}
        rows += [{"image": f"{i}.png", **texts}, {"image": f"{i}.png", "question": "what is it", "answer": "yes"}]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "test.json").write_text(json.dumps(rows[:10]))
    (folder / "texts.txt").write_text("a red boat\n\nwhat is in the image ? a circle\n")
    return folder


def write_grid(work, tmp_path, **changes):
    """Two arms that share stage III, with one or two steps for each stage."""
    grid = {
        "seeds": [0, 1],
        "reference": "off",
        "base": {
            "model_name_or_path": str(work / "start"),
            "dataset_name": str(work / "train.json"),
            "check_data": False,
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "cache_image_features": True,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "stages": {"joint": {"max_steps": 2}},
        },
        "arms": {
            "off": {"visual_head": None, "joint": {"visual_loss_coef": 0}},
            "on": {"visual_head": None, "joint": {}},
        },
        "evaluate": {
            "dataset": str(work / "test.json"),
            "max_new_tokens": 3,
            "kinds": {"color": ["red", "blue"], "other": ["yes"]},
            "metrics": ALL_BUT_OOD,
            "text_file": str(work / "texts.txt"),
        },
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({**grid, **changes}, sort_keys=False))
    return path


def rows_of(output) -> list[dict]:
    return [json.loads(line) for line in (output / "grid" / "rows.jsonl").read_text().splitlines()]
