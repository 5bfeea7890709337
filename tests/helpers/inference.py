# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A tiny model, images and expected answers for the tests of inference. Test files import the fixtures."""

import pytest
import torch
from PIL import Image as PILImage
from transformers import GenerationConfig

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.inference.generation import answer_batch, conversation
from vtlmm.inference.loading import load_model

from .analysis import make_image
from .tiny_models import build_config, build_processor, scale_weights


QUESTION = "what is in the image ?"
COLORS = ("red", "green", "blue", "white", "black")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Return a folder with images and a model that bitsandbytes can quantize. Its answers never end early."""
    folder = tmp_path_factory.mktemp("use")
    config = build_config()
    config.text_config.update({"hidden_size": 64, "intermediate_size": 64, "head_dim": 16})
    torch.manual_seed(0)
    model = VTLMMForConditionalGeneration(config)
    scale_weights(model)
    with torch.no_grad():
        model.initialize_vm_head("random")
        model.model.vm_head.weight.mul_(3)
        # without the mean of the features, which would choose the same word for all patches
        common = model.get_image_features(torch.randn(8, 3, 28, 28)).image_features.flatten(0, 1).mean(0)
        common /= common.norm()
        model.model.vm_head.weight.sub_((model.model.vm_head.weight @ common)[:, None] * common)
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=3)
    model.generation_config.suppress_tokens = [0, 1, 2, 3, config.image_token_id, *range(45, 64)]
    model.save_pretrained(folder / "model")
    build_processor().save_pretrained(folder / "model")
    for color in COLORS:
        PILImage.new("RGB", (28, 28), color).save(folder / f"{color}.png")
    make_image(3).save(folder / "squares.png")
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    return folder


def loaded(work, **options):
    return load_model(work / "model", **options)


@pytest.fixture(scope="module")
def model_and_processor(work):
    return loaded(work)


def expected_answer(model, processor, question: str, *colors: str, length: int = 6, folder=None) -> str:
    """Return the answer of [`answer_batch`] about images of the given colors."""
    images = [PILImage.open(folder / f"{color}.png").convert("RGB") for color in colors]
    [text] = answer_batch(model, processor, [{"images": images, "question": question}], length)
    return text


def turns(*texts: str, images=()) -> list[dict]:
    """Return a conversation: question, answer, question, …. The images are in the first question."""
    messages = conversation({"images": list(images), "question": texts[0]})
    for i, text in enumerate(texts[1:]):
        part = {"type": "text", "text": text}
        messages.append({"role": ("assistant", "user")[i % 2], "content": [part]})
    return messages
