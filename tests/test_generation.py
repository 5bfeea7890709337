# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`generate`: prompts, images and batches of the Python API."""

import json

import pytest
from helpers.inference import COLORS, QUESTION, expected_answer, model_and_processor, work  # noqa: F401 - fixtures
from PIL import Image as PILImage

from vtlmm.cli.main import main
from vtlmm.inference.batch_file import answer_file
from vtlmm.inference.batch_inputs import VisionFeatures
from vtlmm.inference.generation import generate, stream_answer
from vtlmm.inference.loading import load_model
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


@pytest.mark.parametrize("token", ["</s>", "<s>"])
def test_control_tokens_in_a_question_are_text(model_and_processor, token):
    model, processor = model_and_processor
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"what is {token} ?"}]}]
    ids = encode_prompt(processor, messages)
    assert ids.count(processor.image_token_id) == 1 and ids.count(2) == 0 and ids.count(1) == 1
    plain = encode_prompt(processor, [{"role": "user", "content": [{"type": "text", "text": "what is ?"}]}])
    assert len(ids) > len(plain)
    [answer] = generate(model, processor, f"what is {token} ?", PILImage.new("RGB", (28, 28)), max_new_tokens=3)
    assert len(answer.split()) == 3


def test_an_image_mark_means_the_same_in_generate_and_ask(work, model_and_processor, tmp_path, capfd):
    """In a question it is the place of an image; in a part of a conversation it is text."""
    model, processor = model_and_processor
    question, images = "red <image> or <image> ?", [str(work / "red.png"), str(work / "blue.png")]
    [answer] = generate(model, processor, question, images, max_new_tokens=6)
    image, text = {"type": "image"}, {"type": "text", "text": "red"}
    content = [text, image, {"type": "text", "text": "or"}, image, {"type": "text", "text": "?"}]
    assert [answer] == generate(model, processor, [{"role": "user", "content": content}], images, max_new_tokens=6)
    assert main(["ask", str(work / "model"), *images, question, "--max-new-tokens", "6"]) == 0
    assert capfd.readouterr().out == f"{answer}\n"
    (tmp_path / "q.json").write_text(json.dumps([{"question": question, "images": images}]))
    assert answer_file(model, processor, tmp_path / "q.json", tmp_path / "a.jsonl", max_new_tokens=6) == [answer]
    for number in (0, 1, 3):
        with pytest.raises(ValueError, match=f"has 2 image placeholders and {number} images"):
            generate(model, processor, question, (images * 2)[:number])
    parts = [image, {"type": "text", "text": "what is <image> ?"}]
    assert encode_prompt(processor, [{"role": "user", "content": parts}]).count(processor.image_token_id) == 1


def test_positions_of_the_decoder_limit_the_answer(work):
    """The answers of this model never end early."""
    model, processor = load_model(work / "model")
    model.config.text_config.max_position_embeddings = 30
    length = len(encode_prompt(processor, [{"role": "user", "content": [{"type": "text", "text": "what is it ?"}]}]))
    [answer] = generate(model, processor, "what is it ?", max_new_tokens=512)
    assert len(answer.split()) == 30 - length
    messages = [{"role": "user", "content": "what is it ?"}]
    assert "".join(stream_answer(model, processor, messages, 512)).strip() == answer
    with pytest.raises(ValueError, match="tokens with its images, but the decoder has 30 positions"):
        generate(model, processor, "what " * 40)


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_numbers_out_of_range_are_named(model_and_processor, tmp_path, name, value):
    message = f"`{name}` is {value!r}. It must be a whole number of at least 1"
    with pytest.raises(ValueError, match=message):
        generate(*model_and_processor, "what", **{name: value})
    with pytest.raises(ValueError, match=message):
        answer_file(*model_and_processor, tmp_path / "missing.json", tmp_path / "a.jsonl", **{name: value})
    if name == "max_new_tokens":
        with pytest.raises(ValueError, match=message):
            next(stream_answer(*model_and_processor, [{"role": "user", "content": "what"}], value))


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
