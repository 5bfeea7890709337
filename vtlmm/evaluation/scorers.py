# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""
The official scoring rules of the benchmarks.

`SCORERS` score one answer, 0 to 1. `SUMMARIES` take all questions and answers of a benchmark and return percentages.
VQA accuracy is in `vqa_accuracy.py`. MM-Vet has no scorer: a language model grades its answers.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from .vqa_accuracy import textvqa_accuracy, vqa_accuracy


OPTION_LETTERS = "ABCDE"
MMBENCH_ROTATION = 1_000_000
MME_COGNITION = {"code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"}

Row = Mapping[str, Any]


def score_answers(questions: Sequence[Row], answers: Sequence[str], scorer: str) -> list[float]:
    r"""
    Return the score of each answer, 0 to 1. A question with several references gets the best score of them, except for
    VQA accuracy, which uses all ten together.

    Raises:
        `ValueError`: for a scorer that is not in `SCORERS`, or a ground truth that does not fit the scorer.
    """
    if scorer not in SCORERS:
        raise ValueError(f"Unknown scorer {scorer!r}. Choose one of {', '.join(SCORERS)}.")
    scores = []
    for question, answer in zip(questions, answers, strict=True):
        try:
            scores.append(SCORERS[scorer](answer, question))
        except ValueError as error:
            where = f"Row {question['row']}: " if "row" in question else ""
            raise ValueError(f"{where}{error} This is a question of the scorer {scorer}.") from error
    return scores


def summarize(questions: Sequence[Row], answers: Sequence[str], scorer: str) -> dict[str, Any] | None:
    """Return what the benchmark of a scorer reports in addition to the mean; None for most scorers."""
    if scorer not in SUMMARIES:
        return None
    return SUMMARIES[scorer](questions, answers)


def references(question: Row) -> list[str]:
    """Return the accepted answers of a question."""
    return question["answer"] if isinstance(question["answer"], list) else [question["answer"]]


def accuracy_by_kind(questions: Sequence[Row], answers: Sequence[str]) -> dict[str, tuple[float, int]]:
    """Return the share of exact matches and the number of questions of each kind and of `"all"`."""
    scores = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        for kind in {question["kind"], "all"}:
            scores[kind].append(exact_match(answer, question["answer"]))
    return {kind: (sum(values) / len(values), len(values)) for kind, values in sorted(scores.items())}


def _percent(values: Iterable[float]) -> float:
    numbers = list(values)
    return 100 * sum(numbers) / len(numbers) if numbers else 0.0


def _known(label: str, labels: Sequence[str] = ("yes", "no")) -> str:
    """Return `label`. Any answer to another label would silently be wrong."""
    if label not in labels:
        raise ValueError(f"The ground truth {label!r} is not one of {', '.join(labels)}.")
    return label


# ---- Exact match and GQA ----


def exact_match(answer: str, label: str) -> float:
    """Return 1 for equal texts, without regard to case and surrounding spaces."""
    return float(answer.strip().lower() == label.strip().lower())


def gqa_accuracy(answer: str, label: str) -> float:
    """
    Return 1 for equal texts, without regard to case and final periods of the answer. GQA's labels have neither.

    Rule: Hudson and Manning 2019 (https://arxiv.org/abs/1902.09506) with LLaVA's reading of the answer.
    """
    return float(answer.rstrip(".").lower() == label)


# ---- POPE ----


def pope_answer(answer: str) -> str:
    """Return `"no"` if the first sentence has the word No, no or not, otherwise `"yes"`."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def summarize_pope(questions: Sequence[Row], answers: Sequence[str]) -> dict[str, Any]:
    r"""
    Return accuracy, precision, recall, F1 of "yes" and share of "yes" of each split, and the mean F1, which papers
    quote.

    Rule: Li et al. 2023 (https://arxiv.org/abs/2305.10355), `evaluate.py` of https://github.com/AoiDragon/POPE.

    Args:
        questions (`list[dict]`): `kind` is the split (random, popular, adversarial); ground truths are yes and no.
    """
    splits: dict[str, Counter] = defaultdict(Counter)
    for question, answer in zip(questions, answers, strict=True):
        splits[question["kind"]][_known(question["answer"]), pope_answer(answer)] += 1
    result: dict[str, Any] = {}
    for split, counts in splits.items():
        true_yes, said_yes = counts["yes", "yes"], counts["yes", "yes"] + counts["no", "yes"]
        is_yes, number = counts["yes", "yes"] + counts["yes", "no"], counts.total()
        result[split] = {
            "n": number,
            "accuracy": 100 * (true_yes + counts["no", "no"]) / number,
            "precision": 100 * true_yes / said_yes if said_yes else 0.0,
            "recall": 100 * true_yes / is_yes if is_yes else 0.0,
            "f1": 100 * 2 * true_yes / (said_yes + is_yes) if said_yes + is_yes else 0.0,
            "yes_ratio": 100 * said_yes / number,
        }
    return {**result, "mean_f1": sum(split["f1"] for split in result.values()) / len(result)}


# ---- ScienceQA ----


def question_options(question: str) -> dict[str, str]:
    """Return letter to text of the options at the end of a question, as LLaVA writes them: `A. text`, `B. text`, …."""
    _, mark, rest = f"\n{question}".rpartition("\nA. ")
    texts = [rest] if mark else []
    for letter in ascii_uppercase[1:]:
        if not texts or f"\n{letter}. " not in texts[-1]:
            break
        texts[-1:] = texts[-1].split(f"\n{letter}. ", 1)
    return dict(zip(ascii_uppercase, texts, strict=False))


def scienceqa_letter(answer: str, num_choices: int = len(OPTION_LETTERS)) -> str | None:
    """Return the letter of an answer `X`, `X. …` or `… The answer is X. …` (once). None without a valid letter."""
    letter: str | None
    if answer in OPTION_LETTERS and len(answer) == 1:
        letter = answer
    elif answer[:1] and answer[0] in OPTION_LETTERS and answer[1:3] == ". ":
        letter = answer[0]
    else:
        letters = re.findall(r"The answer is ([A-Z]).", answer)
        letter = letters[0] if len(letters) == 1 else None
    return letter if letter and letter in OPTION_LETTERS[:num_choices] else None


def _scienceqa_letter(answer: str, question: Row) -> str | None:
    return scienceqa_letter(answer, len(question_options(question["question"])) or len(OPTION_LETTERS))


def summarize_scienceqa(questions: Sequence[Row], answers: Sequence[str]) -> dict[str, Any]:
    r"""
    Return the accuracy of all questions and of those with an image (SQA-I). An answer without a letter is wrong.

    Rule: Lu et al. 2022 (https://arxiv.org/abs/2209.09513), as `eval_science_qa.py` of LLaVA reads the letter.

    Args:
        questions (`list[dict]`): `question` has the options as lines `A. text`; the ground truth is a letter.
    """
    letters = [_scienceqa_letter(answer, question) for answer, question in zip(answers, questions, strict=True)]
    correct = [letter == question["answer"] for letter, question in zip(letters, questions, strict=True)]
    with_image = [value for value, question in zip(correct, questions, strict=True) if question["images"]]
    return {
        "n": len(questions),
        "accuracy": _percent(correct),
        "n_image": len(with_image),
        "accuracy_image": _percent(with_image),
        "unparsed": letters.count(None),
    }


# ---- MMBench and MMBench-CN ----


def mmbench_option(answer: str, options: Mapping[str, str]) -> str | None:
    r"""
    Return the option that an answer names by its letter as a word, otherwise by its text. None if it is ambiguous.

    An "A" among more than three words may be an article and does not count. Rule: `can_infer` of VLMEvalKit
    (https://github.com/open-compass/VLMEvalKit), without the language model that it asks as a last resort.

    Args:
        answer (`str`)
        options (`dict[str, str]`): letter to text.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and not ("A" in words and len(words) > 3):
        return letters[0]
    texts = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return texts[0] if len(texts) == 1 else None


def mmbench_score(answer: str, question: Row) -> float:
    """Return 1 if an answer names the correct option. `question` has the options as lines `A. text`."""
    options = question_options(question["question"])
    if not options:
        raise ValueError("The question has no options. Write them as lines `A. text`, `B. text`, ….")
    return float(mmbench_option(answer, options) == _known(question["answer"], tuple(options)))


def summarize_mmbench(questions: Sequence[Row], answers: Sequence[str]) -> dict[str, Any]:
    r"""
    Return the circular accuracy, where a question counts if all rotations of its options are correct, and the accuracy
    of the first rotation.

    Rule: Liu et al. 2023 (https://arxiv.org/abs/2307.06281). MMBench-CN is scored alike.

    Args:
        questions (`list[dict]`): `id` is the index of the question, plus 1,000,000 for every rotation.

    Raises:
        `ValueError`: if an id is missing, or the first rotation of a question is missing.
    """
    rotations: dict[Hashable, dict[int, bool]] = defaultdict(dict)
    for question, answer in zip(questions, answers, strict=True):
        if not isinstance(question["id"], int):
            raise ValueError(f"The scorer mmbench needs the column index as ids (--id index), not {question['id']!r}.")
        rotation, index = divmod(question["id"], MMBENCH_ROTATION)
        rotations[index][rotation] = mmbench_score(answer, question) == 1
    missing = [index for index, correct in rotations.items() if 0 not in correct]
    if missing:
        raise ValueError(f"Question {missing[0]} of MMBench has rotations, but not the question itself.")
    return {
        "rows": len(questions),
        "n": len(rotations),
        "circular": _percent(all(correct.values()) for correct in rotations.values()),
        "plain": _percent(correct[0] for correct in rotations.values()),
    }


# ---- MME ----


def mme_answer(answer: str) -> str:
    """Return `"yes"` or `"no"` if the first four characters have it, otherwise `"other"`, which is always wrong."""
    start = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def summarize_mme(questions: Sequence[Row], answers: Sequence[str]) -> dict[str, Any]:
    r"""
    Return the score of each task and the sums over the ten tasks of perception and the four tasks of cognition.

    The score of a task is the percentage of correct answers plus the percentage of images with two correct answers.

    Rule: Fu et al. 2023 (https://arxiv.org/abs/2306.13394), the evaluation tool that comes with the benchmark.

    Args:
        questions (`list[dict]`): `kind` is the task; ground truths are yes and no.

    Raises:
        `ValueError`: if an image does not have two questions.
    """
    images: dict[tuple, list[bool]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        images[(question["kind"], *question["images"])].append(mme_answer(answer) == _known(question["answer"]))
    tasks: dict[str, list[list[bool]]] = defaultdict(list)
    for (task, *names), correct in images.items():
        if len(correct) != 2:
            raise ValueError(f"MME has two questions for each image, but task {task} has {len(correct)} for {names}.")
        tasks[task].append(correct)
    scores = {
        task: _percent(correct for pair in pairs for correct in pair) + _percent(map(all, pairs))
        for task, pairs in sorted(tasks.items())
    }
    return {
        "n": len(questions),
        "perception": sum(score for task, score in scores.items() if task not in MME_COGNITION),
        "cognition": sum(score for task, score in scores.items() if task in MME_COGNITION),
        "category": scores,
    }


# ---- One answer at a time ----


def _best(score: Callable[[str, str], float]) -> Callable[[str, Row], float]:
    """Return a scorer that compares an answer with each reference and returns the best score."""
    return lambda answer, question: max(score(answer, label) for label in references(question))


# Name to a function of the answer and its question
SCORERS: dict[str, Callable[[str, Row], float]] = {
    "exact": _best(exact_match),
    "vqa": lambda answer, question: vqa_accuracy(answer, references(question)),
    "textvqa": lambda answer, question: textvqa_accuracy(answer, references(question)),
    "gqa": _best(gqa_accuracy),
    "pope": _best(lambda answer, label: float(pope_answer(answer) == _known(label))),
    "mme": _best(lambda answer, label: float(mme_answer(answer) == _known(label))),
    "scienceqa": lambda answer, question: float(
        _scienceqa_letter(answer, question) == _known(question["answer"], tuple(OPTION_LETTERS))
    ),
    "mmbench": mmbench_score,
}
# What a benchmark reports in addition to the mean
SUMMARIES: dict[str, Callable[[Sequence[Row], Sequence[str]], dict[str, Any]]] = {
    "pope": summarize_pope,
    "mme": summarize_mme,
    "scienceqa": summarize_scienceqa,
    "mmbench": summarize_mmbench,
}
