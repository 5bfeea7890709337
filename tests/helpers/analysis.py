# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A tiny model and images for the tests of the analysis. Test files import the fixtures."""

import json
import random

import pytest
import torch
from PIL import Image, ImageDraw

from .evaluation import save_model
from .tiny_models import WORDS


NUM_IMAGES = 14


def make_image(seed: int, size: int = 28) -> Image.Image:
    """Return an image of four squares of random colors, one per patch."""
    rng, image = random.Random(seed), Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(image)
    for x in (0, size // 2):
        for y in (0, size // 2):
            draw.rectangle((x, y, x + size // 2, y + size // 2), fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


@pytest.fixture
def model(build_model):
    model = build_model()
    model.initialize_vm_head("random")
    with torch.no_grad():
        model.model.vm_head.weight.mul_(10)
    return model


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    save_model(folder / "model", 0)
    rows = []
    for i in range(NUM_IMAGES):
        make_image(i).save(folder / f"{i}.png")
        row = {"image": f"{i}.png", "question": "is it red", "answer": "no", "what": [{"label": WORDS[9 + i]}]}
        row["what"][0]["bbox"] = [0, 0, 14, 14]
        rows.append(row)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
