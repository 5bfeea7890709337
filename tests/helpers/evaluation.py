# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Tiny models, questions and a finished run for the tests of evaluations. Test files import the fixtures."""

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.cli.main import main
from vtlmm.evaluation.report import SAMPLES_FILE
from vtlmm.evaluation.runner import SHUFFLED_FILE

from .tiny_models import WORDS, build_config, build_processor, scale_weights


NUM_IMAGES, QUESTIONS_PER_IMAGE = 6, 3


def save_model(folder: Path, seed: int) -> None:
    """Save a model whose weights are large enough that its answers depend on the image."""
    torch.manual_seed(seed)
    model = VTLMMForConditionalGeneration(build_config())
    scale_weights(model)
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Return a folder with two tiny models and with questions of different kinds and lengths about images."""
    folder = tmp_path_factory.mktemp("eval")
    for seed in (0, 1):
        save_model(folder / f"model{seed}", seed)
    rng = random.Random(0)
    rows = []
    for i in range(NUM_IMAGES):
        PILImage.new("RGB", (28, 28), tuple(rng.randrange(256) for _ in range(3))).save(folder / f"{i}.png")
        for j in range(QUESTIONS_PER_IMAGE):
            question = " ".join(rng.choices(WORDS, k=1 + (i + j) % 5))
            rows.append({"image": f"{i}.png", "question": question, "answer": rng.choice(WORDS), "kind": f"kind {j}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def finished(work) -> Path:
    """Return the folder of a run that was not interrupted."""
    assert main(arguments(work, work / "finished")) == 0
    return work / "finished"


def arguments(work, output, *more, model: str = "model0", data="rows.jsonl") -> list[str]:
    """Return the arguments of `vtlmm eval`."""
    options = ["--kind", "kind", "--max-new-tokens", "4", "--output", str(output), *more]
    return ["eval", str(work / model), "--dataset", str(work / data), *options]


FILES = ("run.json", "answers.jsonl", SHUFFLED_FILE, "results.json", "results.csv", SAMPLES_FILE)


def read_files(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def records(path) -> list[dict]:
    """Return the records of a file of answers, in the order of the questions."""
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda record: record["index"])
