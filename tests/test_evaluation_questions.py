# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Questions of an evaluation: context, images in place, columns, and shuffled images."""

import json
import random

import pytest
from datasets import Dataset, List
from datasets import Image as ImageFeature
from helpers.tiny_models import build_processor
from PIL import ExifTags
from PIL import Image as PILImage

from vtlmm.data.encoding import encode_messages
from vtlmm.data.images import image_key, open_image
from vtlmm.data.questions import split_questions
from vtlmm.data.rows import load_rows
from vtlmm.evaluation.questions import read_questions
from vtlmm.evaluation.shuffled_images import with_shuffled_images
from vtlmm.inference.generation import conversation
from vtlmm.inference.prompt_encoding import encode_prompt


def test_context_of_a_row_goes_before_its_question(processor):
    def message(role, *texts):
        return {"role": role, "content": [{"type": "text" if text else "image", "text": text} for text in texts]}

    system, answer = message("system", "be short"), message("assistant", "red")
    messages = [system, message("user", None, "what color ?"), answer, message("user", "and", None, "that ?"), answer]
    row = {"messages": messages, "images": ["a", "b"]}
    first, second = split_questions([row])
    assert (first["question"], second["question"]) == ("what color ?", "<image> and <image> that ?")
    assert first["before"] == second["before"] == [message("system", "be short")]
    (given,) = split_questions([{**row, "num_context_messages": 4}])
    assert [m["role"] for m in given["before"]] == ["system", "user", "assistant"]
    assert [m["role"] for m in conversation(given)] == ["system", "user", "assistant", "user"]
    rows = Dataset.from_list([{**row, "images": [], "num_context_messages": n} for n in (0, 4)])
    questions, _ = read_questions(rows.cast_column("images", List(ImageFeature())))
    assert [len(question["before"]) for question in questions] == [1, 1, 3]
    kinds = Dataset.from_list([{**row, "images": [], "kind": kind} for kind in ('"a"', None)])
    questions, _ = read_questions(kinds.cast_column("images", List(ImageFeature())), kind=None)
    assert {question["kind"] for question in questions} == {"all"}  # `kind` was not requested
    (plain,) = split_questions([{"messages": messages[1:3], "images": ["a"]}])
    assert "before" not in plain

    [question] = split_questions([{**row, "messages": messages[1:], "num_context_messages": 3}])
    prompt = processor.apply_chat_template(conversation(question | {"images": [None, None]}), tokenize=False)
    assert prompt == "USER : <image>\nwhat color ? ASSISTANT : red</s> USER : and<image>\nthat ? ASSISTANT :"


def test_images_stay_where_training_reads_them(tmp_path):
    """`vtlmm eval` asks the prompt that was trained, with each image in its place."""
    for color in ("red", "blue"):
        PILImage.new("RGB", (28, 28), color).save(tmp_path / f"{color}.png")
    text = "what is <image> and what is <image> is it red ?"
    row = {"images": ["red.png", "blue.png"], "conversations": [{"from": "human", "value": text}]}
    row["conversations"].append({"from": "gpt", "value": "one"})
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    rows, processor = load_rows(tmp_path / "rows.json"), build_processor()
    ids, supervised = encode_messages(processor, rows[0]["messages"])
    [question], _ = read_questions(rows)
    asked = encode_prompt(processor, conversation(question))
    assert asked == ids[: int(supervised.nonzero()[0])].tolist() and asked.count(processor.image_token_id) == 2
    texts = [token for token in processor.tokenizer.convert_ids_to_tokens(asked) if token in ("what", "<image>", "is")]
    assert texts == ["what", "is", "<image>", "what", "is", "<image>", "is"]


@pytest.mark.parametrize("answer", [3, True, None, 2.5])
def test_references_must_be_texts(tmp_path, answer):
    row = {"question": "what", "answer": "red", "people": ["red", answer]}
    (tmp_path / "rows.json").write_text(json.dumps([row | {"people": ["red"]}, row]))
    rows = load_rows(tmp_path / "rows.json", keep_columns=["people"])
    with pytest.raises(ValueError, match="Row 1: the reference .* is not a text"):
        read_questions(rows, references="people")


def test_no_question_keeps_its_image():
    rng = random.Random(0)
    for trial in range(200):
        images = [f"image {i}" for i in range(rng.randint(2, 6))]
        most = rng.choices(images, weights=[50] + [1] * (len(images) - 1), k=12)  # most questions have one image
        questions = [{"images": [image]} for image in [*images, *most]]
        questions += [{"images": rng.sample(images, rng.randint(0, len(images) - 1))} for _ in range(5)]
        shuffled = with_shuffled_images(questions, seed=trial)
        for question, control in zip(questions, shuffled, strict=True):
            assert not set(question["images"]) & set(control["images"])
            assert len(question["images"]) == len(control["images"])


def test_image_of_a_phone_is_upright(tmp_path):
    """The pixels are rotated, and an EXIF tag has the orientation."""
    image = PILImage.new("RGB", (8, 4), "red")
    image.paste("blue", (0, 0, 4, 4))
    exif = PILImage.Exif()
    exif[ExifTags.Base.Orientation] = 6  # rotate clockwise
    image.save(tmp_path / "phone.png", exif=exif)
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "phone.png", "question": "what ?", "answer": "red"}]))
    (row,) = load_rows(str(tmp_path / "rows.json"))
    found = open_image(tmp_path / "phone.png")
    assert found.size == (4, 8) and found.tobytes() == row["images"][0].convert("RGB").tobytes()


def test_equal_images_are_one_image():
    """Two objects with the same pixels never replace each other."""
    red, again, blue = (PILImage.new("RGB", (4, 4), color) for color in ("red", "red", "blue"))
    assert image_key(red) == image_key(again) != image_key(blue)
    shuffled = with_shuffled_images([{"images": [image]} for image in (red, again, blue)])
    assert [image_key(question["images"][0]) for question in shuffled[:2]] == [image_key(blue)] * 2
    assert image_key(shuffled[2]["images"][0]) == image_key(red)
