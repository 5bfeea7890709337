# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""LLaVA's prompts, character by character, and the files for benchmark servers."""

import gzip
import json
import re

import pandas as pd
import pytest

from vtlmm.evaluation.prompts import ENDINGS, MAX_NEW_TOKENS, build_prompt, build_question, remove_prompt
from vtlmm.evaluation.submissions import check_submission, write_submission
from vtlmm.hub.chat_templates import load_template


# From LLaVA's question files and scripts, without the image
PROMPTS = {
    "vqav2": "Is it red?\nAnswer the question using a single word or phrase.",
    "gqa": "Is it red?\nAnswer the question using a single word or phrase.",
    "pope": "Is it red?\nAnswer the question using a single word or phrase.",
    "mme": "Is it red?\nAnswer the question using a single word or phrase.",
    "vizwiz": "Is it red?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",
    "textvqa": "Is it red?\nReference OCR token: STOP, 7up\nAnswer the question using a single word or phrase.",
    "scienceqa": "Context: A sign.\nIs it red?\nA. yes\nB. no\n"
    "Answer with the option's letter from the given choices directly.",
    "mmbench": "A sign.\nIs it red?\nA. yes\nB. no\nAnswer with the option's letter from the given choices directly.",
    "mmbench_cn": "Is it red?\nA. yes\nB. no\n请直接回答选项字母。",
    "mmvet": "Is it red?",
}
PARTS = {
    "textvqa": {"ocr_tokens": ["STOP", "7up"]},
    "scienceqa": {"hint": "Context: A sign.", "options": ["yes", "no"]},
    "mmbench": {"hint": "A sign.", "options": ["yes", "no"]},
    "mmbench_cn": {"options": ["yes", "no"]},
}


def test_prompts_are_llavas():
    built = {name: build_prompt(name, build_question("Is it red?", **PARTS.get(name, {}))) for name in ENDINGS}
    assert built == PROMPTS
    assert all(build_prompt(name, remove_prompt(name, text)) == text for name, text in PROMPTS.items())
    assert build_prompt(None, "q") == remove_prompt(None, "q") == "q"
    with pytest.raises(ValueError, match="Unknown prompt 'imagenet'"):
        build_prompt("imagenet", "q")
    assert {name for name, number in MAX_NEW_TOKENS.items() if number == 1024} == {
        "scienceqa",
        "mmbench",
        "mmbench_cn",
        "mmvet",
    }
    assert build_question("q", ocr_tokens=[]) == "q\nReference OCR token: "


def test_stored_questions_are_rebuilt_from_their_parts(shared):
    """Rebuild all ScienceQA questions as LLaVA stores them."""
    with gzip.open(shared / "data" / "benchmarks" / "scienceqa.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        *question, last = row["question"].rsplit("\nA. ", 1)
        options = [last]
        for letter in "BCDE"[: row["n_choices"] - 1]:
            options[-1:] = options[-1].split(f"\n{letter}. ", 1)
        context = question[0].rsplit("\n", 1) if question[0].startswith("Context: ") else [None, question[0]]
        assert build_question(context[1], hint=context[0], options=options) == row["question"]


def test_whole_prompt_equals_the_released_prompt(shared, processor):
    """Compare the image, its line break and the question in each chat template."""
    released = json.loads((shared / "reference" / "prompts.json").read_text())
    content = [{"type": "image"}, {"type": "text", "text": build_prompt("gqa", "What is in the image?")}]
    for name, prompts in released.items():
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=load_template(name),
            add_generation_prompt=True,
        )
        expected = prompts["1 turn(s), last answer open"].replace("image?", f"image?\n{ENDINGS['gqa']}")
        assert text.removeprefix("<s>") == expected


def test_answers_of_a_submission_are_normalized(tmp_path):
    questions = [{"id": 3, "question": "q"}, {"id": 4, "question": "q"}]
    path = write_submission(tmp_path, "vqav2", questions, ["The two dogs.", "Yes, it's"])
    assert path == tmp_path / "submission.json"
    assert json.loads(path.read_text()) == [
        {"question_id": 3, "answer": "2 dogs"},
        {"question_id": 4, "answer": "yes it 's"},
    ]
    path = write_submission(tmp_path, "vizwiz", [{"id": "a.jpg", "question": "q"}], ["Unanswerable"])
    assert json.loads(path.read_text()) == [{"image": "a.jpg", "answer": "unanswerable"}]


def test_mmbench_submission_is_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr("vtlmm.evaluation.submissions.find_spec", lambda name: None)  # no openpyxl
    asked = [("hint\nq", ["x", "y"]), ("q", ["x", "y", "z"])]
    questions = [
        {"id": i, "question": build_question(text, options=options)} for i, (text, options) in enumerate(asked)
    ]
    table = pd.read_table(write_submission(tmp_path, "mmbench", questions, ["A", "B. y"]))
    assert list(table) == ["index", "question", "A", "B", "C", "prediction"]
    assert list(table["prediction"]) == ["A", "B. y"] and list(table["question"]) == ["hint\nq", "q"]


def test_submission_needs_every_question_once():
    first, second = {"id": 1, "question": "what"}, {"id": 2, "question": "where"}
    check_submission("vqav2", [first, second], None)
    for questions, subset, message in [
        ([first, second], "the first 2 of 9 rows", "the whole dataset"),
        ([first, {**second, "id": None}], None, "Question 1 ('where') has no id"),
        ([first, {**second, "id": 1}], None, "Questions 0 and 1 have the same id 1"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            check_submission("vqav2", questions, subset)
