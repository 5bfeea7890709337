# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Scorers against published scores of real answers, and against the traps of the official rules."""

import gzip
import json

import pytest

from vtlmm.evaluation.prompts import build_question
from vtlmm.evaluation.report import table_by_kind
from vtlmm.evaluation.scorers import (
    OPTION_LETTERS,
    SCORERS,
    mmbench_option,
    mme_answer,
    pope_answer,
    question_options,
    scienceqa_letter,
    score_answers,
    summarize,
)
from vtlmm.evaluation.vqa_accuracy import CONTRACTIONS, normalize_vqa_answer, textvqa_accuracy, vqa_accuracy


def read_rows(shared, name: str) -> list[dict]:
    with gzip.open(shared / "data" / "benchmarks" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def rounded(value):
    """Return scores with the four decimals of expected.json."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


@pytest.fixture(scope="module")
def expected(shared) -> dict:
    return json.loads((shared / "data" / "benchmarks" / "expected.json").read_text())


def to_question(row: dict, name: str) -> dict:
    """Return a row of a benchmark as a question of `read_questions`."""
    question = {"question": row["question"], "answer": row["label"], "kind": "all", "id": None, "images": ["image"]}
    if name == "pope":
        return question | {"kind": row["category"]}
    if name == "mme":
        return question | {"kind": row["category"], "images": [row["question_id"]]}
    if name == "scienceqa":
        return question | {"images": ["image"] if row["has_image"] else []}
    options = [row[letter] for letter in OPTION_LETTERS if row.get(letter) is not None]
    return question | {"id": row["index"], "question": build_question(row["question"], options=options)}


@pytest.mark.parametrize("name", ["pope", "scienceqa", "mmbench", "mme"])
def test_real_answers_get_their_published_scores(shared, expected, name):
    """Every score and sub-score of LLaVA-1.5-13B's answers, to four decimals."""
    rows = read_rows(shared, name)
    questions, answers = [to_question(row, name) for row in rows], [row["answer"] for row in rows]
    assert rounded(summarize(questions, answers, name)) == expected[name]
    mean = 100 * sum(score_answers(questions, answers, name)) / len(rows)
    if name == "scienceqa":
        assert rounded(mean) == expected[name]["accuracy"]


@pytest.mark.parametrize("kind", ["structural", "semantic"])
def test_gqa_scores_by_type_are_the_published_ones(shared, expected, kind):
    rows = read_rows(shared, "gqa")
    questions = [
        {"question": row["question"], "answer": row["label"], "kind": row[kind], "images": [row["image_id"]]}
        for row in rows
    ]
    lines = table_by_kind(questions, score_answers(questions, [row["answer"] for row in rows], "gqa"), None)
    scores = {line["kind"]: rounded(100 * line["score"]) for line in lines}
    assert scores.pop("all") == expected["gqa"]["accuracy"] and scores == expected["gqa"][kind]


def test_vqa_scores_equal_the_official_programs(shared):
    cases = json.loads((shared / "data" / "benchmarks" / "vqa_cases.json").read_text())
    found = [100 * vqa_accuracy(row["answer"], row["answers"]) for row in cases["rows"]]
    assert found == [row["vqa_score"] for row in cases["rows"]]
    assert sum(found) / len(found) == cases["vqa_overall"]
    found = [100 * textvqa_accuracy(row["answer"], row["answers"]) for row in cases["rows"]]
    assert found == [row["textvqa_score"] for row in cases["rows"]]
    assert sum(found) / len(found) == pytest.approx(cases["textvqa_overall"], abs=1e-12)


def test_vqa_rules():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0  # the ten agree, so nothing is normalized
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1
    assert textvqa_accuracy("Yes", ["yes"] * 10) == 1
    answers = ["red"] * 2 + ["blue"] + [f"other {i}" for i in range(7)]
    assert [vqa_accuracy(answer, answers) for answer in ("red", "blue", "green")] == [0.6, 0.3, 0]
    assert normalize_vqa_answer("The two\tdogs wont,") == "2 dogs won't"
    assert normalize_vqa_answer("a-b 1,000") == "ab 1000" and normalize_vqa_answer("a-b") == "b"
    assert normalize_vqa_answer("t-shirt") == "t shirt" and normalize_vqa_answer("t- shirt") == "t shirt"
    assert normalize_vqa_answer("a.m. 3.5.") == "am 3.5"
    assert len(CONTRACTIONS) == 114 and CONTRACTIONS["yall'd've"] == "y'all'd've" and "its" not in CONTRACTIONS
    with pytest.raises(ValueError, match="10 annotators, but there are 1"):
        vqa_accuracy("red", ["red"])


def test_answers_are_read_by_the_official_rules():
    assert [pope_answer(text) for text in ("No.", "There is not, no", "None", "Yes. No", "Not")] == [
        "no",
        "no",
        "yes",
        "yes",
        "yes",
    ]
    letters = {"B": "B", "C. x": "C", "So. The answer is A.": "A", "E": None, "B is right": None, "AB": None, "": None}
    assert {text: scienceqa_letter(text, 4) for text in letters} == letters
    assert scienceqa_letter("The answer is A. The answer is B.") is None
    options = {"A": "a red car", "B": "red", "C": "blue"}
    assert mmbench_option("(B)", options) == "B" and mmbench_option("C: blue", options) == "C"
    assert mmbench_option("It must be blue", options) == "C"
    assert mmbench_option("A is what is blue", options) == "C"  # that A may be an article
    assert mmbench_option("A or B", options) is None and mmbench_option("red car", options) == "B"
    assert [mme_answer(text) for text in ("Yes", "not", "I know", "Church")] == ["yes", "no", "other", "other"]


def test_options_are_the_end_of_a_question():
    assert question_options("A. x or B. y?\nWhich?\nA. one\nline 2\nB. \nC. three") == {
        "A": "one\nline 2",
        "B": "",
        "C": "three",
    }
    assert question_options("Is it red?") == {}


QUESTION = {"question": "What?\nA. banana\nB. cherry", "answer": "A", "kind": "count", "id": 3, "images": ["x"]}


def test_ground_truths_that_do_not_fit_are_rejected():
    for label in ("", "AB", "F"):
        with pytest.raises(ValueError, match="is not one of A, B, C, D, E"):
            SCORERS["scienceqa"]("A", QUESTION | {"answer": label})
    with pytest.raises(ValueError, match="is not one of A, B"):
        SCORERS["mmbench"]("A", QUESTION | {"answer": "C"})
    with pytest.raises(ValueError, match="Row 7: The ground truth 'Yes' is not one of yes, no"):
        score_answers([{"answer": "Yes", "row": 7}], ["yes"], "pope")
    with pytest.raises(ValueError, match="two questions for each image, but task count has 1"):
        summarize([QUESTION | {"answer": "yes"}], ["yes"], "mme")
    with pytest.raises(ValueError, match="needs the column index"):
        summarize([QUESTION | {"id": None}], ["A"], "mmbench")
    with pytest.raises(ValueError, match="not the question itself"):
        summarize([QUESTION | {"id": 1_000_003}], ["A"], "mmbench")
    with pytest.raises(ValueError, match="no options"):
        SCORERS["mmbench"]("A", QUESTION | {"question": "What?"})
    with pytest.raises(ValueError, match="Unknown scorer 'BLEU'"):
        score_answers([QUESTION], ["A"], "BLEU")


def test_empty_answers_score_zero():
    """POPE's rule reads an empty answer as yes."""
    truths = {"vqa": ["red"] * 10, "textvqa": ["red"] * 10, "pope": "no", "mme": "yes", "scienceqa": "A"}
    truths["mmbench"] = "A"
    scores = {name: score("", QUESTION | {"answer": truths.get(name, "red")}) for name, score in SCORERS.items()}
    assert scores == dict.fromkeys(SCORERS, 0.0)


def test_the_best_of_several_references_counts():
    question = QUESTION | {"answer": ["red", "blue"]}
    assert score_answers([question] * 2, ["Blue", "green"], "exact") == [1, 0]
