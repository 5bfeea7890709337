# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm chat` and the page of `vtlmm app`: conversations that stream."""

import html
import io
import time

import pytest
from helpers.inference import QUESTION, expected_answer, loaded, model_and_processor, turns, work  # noqa: F401 - fixtures
from PIL import Image as PILImage

from vtlmm.analysis.app import (
    EXAMPLES,
    IMAGE_FEATURES,
    OTHER_IMAGE,
    PSEUDO_IMAGE_FEATURES,
    answers_so_far,
    build_page,
    compare_inputs,
    comparison_html,
    examples_of_rows,
    words_frame,
)
from vtlmm.analysis.visual_tokens import format_patch_words
from vtlmm.cli.main import main
from vtlmm.data.rows import load_rows
from vtlmm.inference.generation import stream_answer
from vtlmm.inference.scheduler import Scheduler


def test_pieces_of_a_stream_form_the_answer(work, model_and_processor):
    model, processor = model_and_processor
    red = PILImage.open(work / "red.png").convert("RGB")
    pieces = list(stream_answer(model, processor, turns(QUESTION, images=[red]), 6))
    assert len([piece for piece in pieces if piece]) > 2
    assert "".join(pieces).strip() == expected_answer(model, processor, QUESTION, "red", folder=work)
    stream = stream_answer(model, processor, turns(QUESTION, images=[red]), 100_000)
    next(stream)
    stream.close()  # otherwise the generation would take minutes
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(stream_answer(model, processor, turns(QUESTION), 0))


def test_chat_keeps_the_conversation(work, model_and_processor, monkeypatch, capsys):
    """Two turns about an image, another image, invalid commands, and a new conversation."""
    model, processor = model_and_processor
    red, squares = (PILImage.open(work / f"{name}.png").convert("RGB") for name in ("red", "squares"))
    lines = [
        QUESTION,
        "is it red ?",
        f"/image {work}/broken.png",
        "/jump",
        f"/image {work}/squares.png",
        "is it blue ?",
    ]
    lines += ["/words", "/reset", "/words", "hello", "/quit", "after the end"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    monkeypatch.setenv("COLUMNS", "80")
    command = ["chat", str(work / "model"), "--image", str(work / "red.png"), "--max-new-tokens", "6"]
    assert main(command) == 0

    def answered(messages):
        return "".join(stream_answer(model, processor, messages, 6)).strip()

    first = turns(QUESTION, images=[red])
    one = answered(first)
    second = [*first, *turns("", one, "is it red ?")[1:]]
    two = answered(second)
    third = [*second, *turns("", two)[1:], *turns("is it blue ?", images=[squares])]
    words = format_patch_words(model, processor, squares, 80).split()
    found = [line.removeprefix("> ") for line in capsys.readouterr().out.splitlines()[1:]]
    assert found[:2] == [one, two] and len({one, two}) == 2
    assert "broken.png: the file is not an image" in found[2] and found[3].startswith("Unknown command /jump")
    assert found[4].removeprefix("> ") == answered(third)
    assert " ".join(found[5:7]).split() == words and len(set(words)) > 1
    assert "Add an image first" in found[7] and found[8:] == [answered(turns("hello")), ""]


def test_page_shows_words_and_answers(work):
    model, processor = loaded(work)
    red = PILImage.open(work / "red.png")
    frames = {kind: words_frame(model, processor, red, kind) for kind in (IMAGE_FEATURES, PSEUDO_IMAGE_FEATURES)}
    assert frames[IMAGE_FEATURES] != frames[PSEUDO_IMAGE_FEATURES]
    page = html.unescape(frames[IMAGE_FEATURES])
    assert page.count("<text ") == 4 and "http" not in page
    assert "No image: answering from text only" in words_frame(model, processor, None, IMAGE_FEATURES)
    answers, scheduler = {}, Scheduler(model, processor)
    for kind in frames:
        grown = list(answers_so_far(scheduler, red, kind, [], QUESTION, 6))
        assert [turn[-1][1] for turn in grown] == sorted((turn[-1][1] for turn in grown), key=len)
        answers[kind] = grown[-1]
    assert answers[IMAGE_FEATURES] == [(QUESTION, expected_answer(*loaded(work), QUESTION, "red", folder=work))]
    assert answers[PSEUDO_IMAGE_FEATURES] != answers[IMAGE_FEATURES]
    *_, second = answers_so_far(scheduler, red, IMAGE_FEATURES, answers[IMAGE_FEATURES], "is it red ?", 6)
    messages = turns(QUESTION, second[0][1], "is it red ?", images=[red.convert("RGB")])
    assert second[0] == answers[IMAGE_FEATURES][0]
    assert second[1] == ("is it red ?", "".join(stream_answer(model, processor, messages, 6)).strip())


def test_conversations_of_the_page_do_not_wait_for_each_other(work):
    model, processor = loaded(work)
    scheduler = Scheduler(model, processor)
    red = work / "red.png"
    long = answers_so_far(scheduler, red, IMAGE_FEATURES, [], QUESTION, 2000)
    next(long)
    answers = {
        kind: list(answers_so_far(scheduler, red, kind, [], QUESTION, 6))[-1]
        for kind in (PSEUDO_IMAGE_FEATURES, IMAGE_FEATURES)
    }
    frame = scheduler.call(lambda: words_frame(model, processor, red, IMAGE_FEATURES))
    assert frame.startswith("<iframe") and scheduler.num_running == 1  # the long answer goes on
    # the two kinds of features are in the same batch
    assert answers[IMAGE_FEATURES] == [(QUESTION, expected_answer(*loaded(work), QUESTION, "red", folder=work))]
    assert answers[PSEUDO_IMAGE_FEATURES] != answers[IMAGE_FEATURES]
    long.close()
    deadline = time.monotonic() + 60
    while scheduler.num_running:
        assert time.monotonic() < deadline
    scheduler.close()


def test_comparison_answers_from_three_inputs(work):
    model, processor = loaded(work)
    red, blue = (PILImage.open(work / f"{color}.png") for color in ("red", "blue"))
    scheduler = Scheduler(model, processor)
    *_, answers = compare_inputs(scheduler, red, blue, QUESTION, 6)
    scheduler.close()
    model, processor = loaded(work)
    assert answers[IMAGE_FEATURES] == expected_answer(model, processor, QUESTION, "red", folder=work)
    assert answers[OTHER_IMAGE] == expected_answer(model, processor, QUESTION, "blue", folder=work)
    model.config.use_pseudo_image_features = True
    assert answers[PSEUDO_IMAGE_FEATURES] == expected_answer(model, processor, QUESTION, "red", folder=work)
    assert len(set(answers.values())) == 3
    text = comparison_html("<b>", {IMAGE_FEATURES: "<script>"})
    assert "<script>" not in text and "<p>&lt;b&gt;</p>" in text


def test_examples_are_different_images_with_a_question(work, tmp_path):
    questions = {"red": "what ?", "blue": "is it blue ?"}
    rows = load_rows(
        [
            {"image": str(work / f"{color}.png"), "question": questions[color], "answer": "no"}
            for color in ("red", "red", "blue")
        ]
    )
    found = examples_of_rows(rows, tmp_path)
    assert [text for _, text in found] == list(questions.values())
    assert [PILImage.open(path).getpixel((3, 3)) for path, _ in found] == [(255, 0, 0), (0, 0, 255)]
    with pytest.raises(ValueError, match="no question about one image"):
        examples_of_rows(load_rows([{"question": "what ?", "answer": "no"}]), tmp_path)


@pytest.mark.slow
def test_page_is_built(model_and_processor):
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    page = build_page(*model_and_processor, "model")
    settings = page.get_config_file()
    assert all(event["queue"] and event["batch"] is False for event in settings["dependencies"])
    assert settings["analytics_enabled"] is False
    assert len([event for event in settings["dependencies"] if event["targets"][0][1] == "change"]) == 2
    buttons = [part["props"]["value"] for part in settings["components"] if part["type"] == "button"]
    assert buttons[:3] == [text for _, text in EXAMPLES] and len(set(buttons)) == 4
