# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Prompts about the same images share the keys and values of their start."""

import pytest
from helpers.serving import build_serving_model
from helpers.tiny_models import TEXT_CONFIGS, build_processor
from PIL import Image

from vtlmm.inference import shared_prefix
from vtlmm.inference.generation import build_prompt, generate_answers


RED, BLUE, GREEN = (Image.new("RGB", (28, 28), color) for color in ("red", "blue", "green"))
QUESTIONS = ("what is it ?", "is it a red circle on the left of a blue square ?", "yes or no ?", "color ?")
ASKED = [(question, [image]) for image in (RED, BLUE) for question in QUESTIONS]
ASKED += [("what is it ?", [GREEN]), ("what is it ?", [RED, BLUE]), ("say : hello there", [RED, BLUE])]


def answer(model, asked, batch_size: int):
    """Return texts and log probabilities."""
    model.generation_config.eos_token_id = 2
    sources: dict = {}
    prompts = [build_prompt(*each, sources) for each in asked]
    settings = {"max_new_tokens": 5, "batch_size": batch_size}
    return generate_answers(model, build_processor(), prompts, sources.__getitem__, **settings)


@pytest.fixture
def lengths(monkeypatch):
    """The numbers of prefixes that are computed together."""
    found, start_batch = [], shared_prefix.start_batch

    def count(model, inputs, max_new_tokens):
        found.append(len(inputs["input_ids"]))
        return start_batch(model, inputs, max_new_tokens)

    monkeypatch.setattr(shared_prefix, "start_batch", count)
    return found


@pytest.mark.parametrize("text", list(TEXT_CONFIGS))
def test_answers_equal_those_one_by_one(text, lengths):
    model = build_serving_model(text=text)
    alone = [answer(model, [each], 1)[0] for each in ASKED]
    assert not lengths and len({each.text for each in alone}) > 5
    for batch_size, expected in ((1, [1, 1, 1]), (3, [2, 1, 1]), (8, [3, 1]), (11, [4])):
        lengths.clear()
        together = answer(model, ASKED, batch_size)
        assert [each.text for each in together] == [each.text for each in alone], batch_size
        for one, other in zip(together, alone, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
        assert lengths == expected, batch_size


@pytest.mark.parametrize("change", ["sliding window", "static cache", "no cache", "question before the image"])
def test_other_prompts_are_computed_as_a_whole(change, lengths):
    model, asked = build_serving_model(text="mistral"), ASKED
    if change == "sliding window":
        model.config.text_config.sliding_window = 8
        model.config.text_config.layer_types = ["sliding_attention"] * 2
    elif change == "static cache":
        model.generation_config.cache_implementation = "static"
    elif change == "no cache":
        model.generation_config.use_cache = False
    else:
        asked = [(f"{question} <image>", [image]) for question in QUESTIONS for image in (RED, BLUE)]
    alone = [answer(model, [each], 1)[0].text for each in asked]
    assert [each.text for each in answer(model, asked, 8)] == alone and not lengths
