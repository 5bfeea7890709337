# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""LLaVA's prompts to the character, and the files that benchmark servers take."""

import gzip
import json

import pandas as pd
import pytest

from vtlmm.evaluation.prompts import ENDINGS, MAX_NEW_TOKENS, build_prompt, build_question
from vtlmm.evaluation.submissions import write_mmbench_submission, write_submission
from vtlmm.hub.chat_templates import load_template


# As LLaVA's question files and scripts have them, behind the image
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
    assert {name for name, number in MAX_NEW_TOKENS.items() if number == 1024} == {
        "scienceqa",
        "mmbench",
        "mmbench_cn",
        "mmvet",
    }
    assert build_question("q", ocr_tokens=[]) == "q\nReference OCR token: "


def test_stored_questions_are_rebuilt(shared):
    """All ScienceQA questions as LLaVA stores them, from their parts."""
    with gzip.open(shared / "data" / "benchmarks" / "scienceqa.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        *question, last = row["question"].rsplit("\nA. ", 1)
        options = [last]
        for letter in "BCDE"[: row["n_choices"] - 1]:
            options[-1:] = options[-1].split(f"\n{letter}. ", 1)
        context = question[0].rsplit("\n", 1) if question[0].startswith("Context: ") else [None, question[0]]
        assert build_question(context[1], hint=context[0], options=options) == row["question"]


def test_the_whole_prompt_is_the_released_one(shared, processor):
    """Image, line break, question: by the chat templates that stand around it."""
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


def test_submissions(tmp_path):
    """Answers are normalized as the server would; none is left out of MMBench's table."""
    write_submission(tmp_path / "vqav2.json", "vqav2", {3: "The two dogs.", 4: "Yes, it's"})
    assert json.loads((tmp_path / "vqav2.json").read_text()) == [
        {"question_id": 3, "answer": "2 dogs"},
        {"question_id": 4, "answer": "yes it 's"},
    ]
    write_submission(tmp_path / "vizwiz.json", "vizwiz", {"a.jpg": "Unanswerable"})
    assert json.loads((tmp_path / "vizwiz.json").read_text()) == [{"image": "a.jpg", "answer": "unanswerable"}]

    table = pd.DataFrame({"index": [5, 1_000_005], "question": "q", "hint": "h", "A": "x", "B": "y", "image": "…"})
    table.to_csv(tmp_path / "mmbench.tsv", sep="\t", index=False)
    write_mmbench_submission(tmp_path / "out.tsv", tmp_path / "mmbench.tsv", {5: "A", 1_000_005: "B"})
    found = pd.read_table(tmp_path / "out.tsv")
    assert list(found) == ["index", "question", "A", "B", "prediction"] and list(found["prediction"]) == ["A", "B"]
    with pytest.raises(ValueError, match="1 questions of .* have no answer, e.g. index 1000005"):
        write_mmbench_submission(tmp_path / "out.tsv", tmp_path / "mmbench.tsv", {5: "A"})
