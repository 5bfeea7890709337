# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Commands and Python snippets of the documentation, and a working directory in which they run at toy size."""

import json
import re
import shlex
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from modeling_vtlmm import VTLMMForConditionalGeneration

from .tiny_models import build_config, build_processor


ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/**/*.md"), ROOT / "benchmarks/README.md"]
)
QUESTION = "how many shapes are there?"


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """Return the `vtlmm` commands of a page as lists of words."""
    lines = [
        line.strip()
        for block in blocks(page, "bash")
        for line in re.sub(r"\\\n\s*", "", block).splitlines()
        if line.strip().startswith("vtlmm ")
    ]
    return [shlex.split(line.partition("  # ")[0].replace("$seed", "0")) for line in lines]


def write_demo_outputs(folder: Path) -> None:
    """Write a tiny model and data where the documentation expects the demo's, in the working directory `folder`."""
    demo = folder / "outputs" / "demo"
    torch.manual_seed(0)
    VTLMMForConditionalGeneration(build_config()).save_pretrained(demo / "model")
    build_processor().save_pretrained(demo / "model")
    PILImage.new("RGB", (28, 28), "red").save(demo / "image.png")
    (folder / "images").mkdir()
    for number, color in enumerate(("red", "blue"), 1):
        for place in (folder, folder / "images"):
            PILImage.new("RGB", (28, 28), color).save(place / f"{number}.jpg")
    captions = []
    for number in range(3, 43):
        color = ("red", "blue", "green", "white")[number % 4]
        PILImage.new("RGB", (28, 28), color).save(folder / "images" / f"{number}.jpg")
        captions.append({"image": f"{number}.jpg", "caption": f"a {color} boat"})
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "held_out.json").write_text(json.dumps(captions[:4]))
    (folder / "rows.csv").write_text(
        "image,question,answer\n1.jpg,what is it ?,a red boat\n2.jpg,what is it ?,a blue boat\n"
    )
    rows = [
        {"image": str(demo / "image.png"), "question": "what is it ?", "answer": answer, "kind": "color"}
        for answer in ("red", "blue")
    ]
    features = Features({name: Value("string") for name in ("question", "answer", "kind")} | {"image": Image()})
    Dataset.from_list(rows).cast(features).to_parquet(demo / "held_out.parquet")
