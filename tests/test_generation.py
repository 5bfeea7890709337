# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`generate`: prompts, images and batches of the Python API."""

import pytest
from helpers.inference import COLORS, QUESTION, expected_answer, model_and_processor, work  # noqa: F401 - fixtures
from PIL import Image as PILImage

from vtlmm.inference.batch_inputs import VisionFeatures
from vtlmm.inference.generation import generate
from vtlmm.inference.prompt_encoding import encode_prompt


def test_generate_takes_paths_and_lists(work, model_and_processor):
    model, processor = model_and_processor
    [one] = generate(model, processor, QUESTION, str(work / "red.png"), max_new_tokens=6)
    assert one == expected_answer(model, processor, QUESTION, "red", folder=work)
    red, blue = str(work / "red.png"), PILImage.open(work / "blue.png")
    questions = [QUESTION, "hello", "yes or no ?", "what " * 5]
    images = [red, None, [red, blue], blue]
    together = generate(model, processor, questions, images, max_new_tokens=6, batch_size=3)
    pairs = zip(questions, images, strict=True)
    assert together == [generate(model, processor, q, i, max_new_tokens=6)[0] for q, i in pairs]
    assert len(set(together)) == 4
    with pytest.raises(ValueError, match="one entry for each of the 2 questions"):
        generate(model, processor, ["what", "is"], [red])
    with pytest.raises(ValueError, match="more image parts than images"):
        generate(model, processor, [{"role": "user", "content": [{"type": "image"}]}])


def test_tower_runs_once_per_image(work, model_and_processor, monkeypatch):
    model, processor = model_and_processor
    encoded, forward = [], model.model.vision_tower.forward
    monkeypatch.setattr(
        model.model.vision_tower, "forward", lambda pixels, **kw: encoded.append(len(pixels)) or forward(pixels, **kw)
    )
    questions = ["what " * (i % 3 + 1) for i in range(12)]
    images = [str(work / f"{COLORS[i % 4]}.png") for i in range(12)]
    features = VisionFeatures()
    answers = generate(model, processor, questions, images, max_new_tokens=4, batch_size=5, vision_features=features)
    assert sum(encoded) == 4 == len(features)
    assert generate(model, processor, questions, images, max_new_tokens=4, vision_features=features) == answers
    assert sum(encoded) == 4
    small = VisionFeatures(max_images=2)
    assert generate(model, processor, questions, images, max_new_tokens=4, vision_features=small) == answers
    assert len(small) == 2


@pytest.mark.parametrize("token", ["<image>", "</s>", "<s>"])
def test_control_tokens_in_a_question_are_text(model_and_processor, token):
    model, processor = model_and_processor
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"what is {token} ?"}]}]
    ids = encode_prompt(processor, messages)
    assert ids.count(processor.image_token_id) == 1 and ids.count(2) == 0 and ids.count(1) == 1
    plain = encode_prompt(processor, [{"role": "user", "content": [{"type": "text", "text": "what is ?"}]}])
    assert len(ids) > len(plain)
    [answer] = generate(model, processor, f"what is {token} ?", PILImage.new("RGB", (28, 28)), max_new_tokens=3)
    assert len(answer.split()) == 3


def test_prompt_is_encoded_as_by_the_processor(model_and_processor):
    _, processor = model_and_processor
    image = PILImage.new("RGB", (28, 28))
    content = [{"type": "text", "text": "a"}, {"type": "image", "image": image}, {"type": "text", "text": "what ?"}]
    messages = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    expected = processor.apply_chat_template(messages, **options)
    image_id = processor.image_token_id
    ids = [i for token in encode_prompt(processor, messages) for i in [token] * (4 if token == image_id else 1)]
    assert [ids] == expected["input_ids"] and ids.count(image_id) == 4
