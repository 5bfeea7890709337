# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Scorers against published scores of real answers, and against the traps of the official rules."""

import gzip
import json

import pytest

from vtlmm.evaluation.scorers import (
    SCORERS,
    mmbench_option,
    mme_answer,
    pope_answer,
    scienceqa_letter,
    score_gqa,
    score_mmbench,
    score_mme,
    score_mmvet,
    score_pope,
    score_scienceqa,
)
from vtlmm.evaluation.vqa_accuracy import CONTRACTIONS, normalize_vqa_answer, textvqa_accuracy, vqa_accuracy


def read_rows(shared, name: str) -> list[dict]:
    with gzip.open(shared / "data" / "benchmarks" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def rounded(value):
    """Scores to the four decimals of expected.json."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


@pytest.fixture(scope="module")
def expected(shared) -> dict:
    return json.loads((shared / "data" / "benchmarks" / "expected.json").read_text())


SCORES = [
    (score_pope, "pope"),
    (score_gqa, "gqa"),
    (score_scienceqa, "scienceqa"),
    (score_mmbench, "mmbench"),
    (score_mme, "mme"),
]


@pytest.mark.parametrize(("score", "name"), SCORES, ids=[name for _, name in SCORES])
def test_real_answers_get_their_published_scores(shared, expected, score, name):
    """LLaVA-1.5-13B's answers: every score and sub-score to the last digit that is known."""
    assert rounded(score(read_rows(shared, name))) == expected[name]


def test_mmvet_grades_are_aggregated_as_published(shared, expected):
    rows = read_rows(shared, "mmvet")
    found = rounded(score_mmvet(rows))
    runs = [score_mmvet([{**row, "grade": row["grades_3runs"][i]} for row in rows])["total"] for i in range(3)]
    found |= {"total_3runs": list(map(rounded, runs)), "total_7b": rounded(score_mmvet(rows, "grade_7b"))["total"]}
    assert found == expected["mmvet"]
    with pytest.raises(ValueError, match="v1_0: grade is None"):
        score_mmvet([{**rows[0], "grade": None}])


def test_vqa_scores_are_those_of_the_official_programs(shared):
    cases = json.loads((shared / "data" / "benchmarks" / "vqa_cases.json").read_text())
    found = [100 * vqa_accuracy(row["answer"], row["answers"]) for row in cases["rows"]]
    assert found == [row["vqa_score"] for row in cases["rows"]]
    assert sum(found) / len(found) == cases["vqa_overall"]
    found = [100 * textvqa_accuracy(row["answer"], row["answers"]) for row in cases["rows"]]
    assert found == [row["textvqa_score"] for row in cases["rows"]]
    assert sum(found) / len(found) == pytest.approx(cases["textvqa_overall"], abs=1e-12)


def test_vqa_rules():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0  # the ten agree: nothing is normalized
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1
    assert textvqa_accuracy("Yes", ["yes"] * 10) == 1
    answers = ["red"] * 2 + ["blue"] + [f"other {i}" for i in range(7)]
    assert [vqa_accuracy(answer, answers) for answer in ("red", "blue", "green")] == [0.6, 0.3, 0]
    assert normalize_vqa_answer("The two\tdogs wont,") == "2 dogs won't"
    assert normalize_vqa_answer("a-b 1,000") == "ab 1000" and normalize_vqa_answer("a-b") == "b"
    assert normalize_vqa_answer("t-shirt") == "t shirt" and normalize_vqa_answer("t- shirt") == "t shirt"
    assert normalize_vqa_answer("a.m. 3.5.") == "am 3.5"
    assert len(CONTRACTIONS) == 114 and CONTRACTIONS["yall'd've"] == "y'all'd've" and "its" not in CONTRACTIONS
    with pytest.raises(ValueError, match="10 people, and there are 1"):
        vqa_accuracy("red", ["red"])


def test_how_answers_are_read():
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
    # an option that the table lacks is no option, whatever reads it
    row = {"index": 3, "A": "banana", "B": "cherry", "C": float("nan"), "D": None, "answer": "banana", "label": "A"}
    assert score_mmbench([row])["circular"] == 100
    for label in ("", "AB", "F"):
        with pytest.raises(ValueError, match="which this benchmark has"):
            SCORERS["scienceqa"]("A", label)
    assert [mme_answer(text) for text in ("Yes", "not", "I know", "Church")] == ["yes", "no", "other", "other"]
    with pytest.raises(ValueError, match="two questions about a image; count has 1"):
        score_mme([{"category": "count", "question_id": "x", "label": "yes", "answer": "yes"}])
    with pytest.raises(ValueError, match="The truth 'Yes' is none of yes, no"):
        score_pope([{"category": "random", "label": "Yes", "answer": "yes"}])


def test_no_answer_scores_as_right():
    """An empty answer is 0 by every scorer, but POPE's rule, which reads it as yes."""
    truths = {"vqa": ["red"] * 10, "textvqa": ["red"] * 10, "pope": "no", "mme": "yes", "scienceqa": "A"}
    assert {name: score("", truths.get(name, "red")) for name, score in SCORERS.items()} == dict.fromkeys(SCORERS, 0.0)
