# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""
The official rules of the benchmarks, as pure functions.

`score_…` take the rows of a whole benchmark, dicts with `label` (the truth), `answer` (what the model said) and the
keys that the docstring names, and return percentages. `SCORERS` score one answer, 0 to 1. VQA accuracy is in `vqa.py`.
"""

import re
from collections import Counter, defaultdict

from .vqa_accuracy import textvqa_accuracy, vqa_accuracy


OPTION_LETTERS = "ABCDE"
MMBENCH_ROTATION = 1_000_000
MME_COGNITION = {"code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"}


def _percent(values) -> float:
    values = list(values)
    return 100 * sum(values) / len(values)


def _percent_by(rows: list[dict], key: str, value) -> dict[str, float]:
    groups = defaultdict(list)
    for row in rows:
        groups[row[key]].append(value(row))
    return {name: _percent(values) for name, values in sorted(groups.items())}


def _known(label: str, labels=("yes", "no")) -> str:
    """`label` itself; any other than the benchmark's would silently never be right."""
    if label not in labels:
        raise ValueError(f"The truth {label!r} is none of {', '.join(labels)}, which this benchmark has.")
    return label


# ---- POPE ----


def pope_answer(answer: str) -> str:
    """`"no"` when the first sentence has the word No, no or not; anything else is `"yes"`."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score_pope(rows: list[dict]) -> dict:
    r"""
    Accuracy, precision, recall, F1 (of "yes") and share of "yes" in each split, and the mean F1, which papers quote.

    Rule: Li et al. 2023 (https://arxiv.org/abs/2305.10355), `evaluate.py` of https://github.com/AoiDragon/POPE.

    Args:
        rows (`list[dict]`): with `category`, the split (random, popular, adversarial); labels are yes and no.
    """
    splits = defaultdict(Counter)
    for row in rows:
        splits[row["category"]][_known(row["label"]), pope_answer(row["answer"])] += 1
    result = {}
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


# ---- GQA ----


def gqa_accuracy(answer: str, label: str) -> float:
    """1 when they are equal; capitals and final full stops of the answer do not count (labels have neither)."""
    return float(answer.rstrip(".").lower() == label)


def score_gqa(rows: list[dict]) -> dict:
    r"""
    Accuracy over all questions and by type.

    Rule: Hudson and Manning 2019 (https://arxiv.org/abs/1902.09506) with LLaVA's reading of the answer.

    Args:
        rows (`list[dict]`): with the types `structural` and `semantic`.
    """

    def right(row):
        return gqa_accuracy(row["answer"], row["label"])

    return {
        "n": len(rows),
        "accuracy": _percent(map(right, rows)),
        "structural": _percent_by(rows, "structural", right),
        "semantic": _percent_by(rows, "semantic", right),
    }


# ---- ScienceQA ----


def scienceqa_letter(answer: str, num_choices: int = len(OPTION_LETTERS)) -> str | None:
    """The letter of an answer `X`, `X. …` or `… The answer is X. …` (just once); None without one of the choices."""
    if answer in OPTION_LETTERS and len(answer) == 1:
        letter = answer
    elif answer[:1] and answer[0] in OPTION_LETTERS and answer[1:3] == ". ":
        letter = answer[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", answer)
        letter = found[0] if len(found) == 1 else None
    return letter if letter and letter in OPTION_LETTERS[:num_choices] else None


def score_scienceqa(rows: list[dict]) -> dict:
    r"""
    Accuracy over all questions and over those with a image (SQA-I). An answer without a letter is wrong.

    Rule: Lu et al. 2022 (https://arxiv.org/abs/2209.09513), as `eval_science_qa.py` of LLaVA reads the letter.

    Args:
        rows (`list[dict]`): with `n_choices` and `has_image`.
    """
    letters = [scienceqa_letter(row["answer"], row["n_choices"]) for row in rows]
    right = [letter == row["label"] for letter, row in zip(letters, rows, strict=True)]
    with_image = [value for value, row in zip(right, rows, strict=True) if row["has_image"]]
    return {
        "n": len(rows),
        "accuracy": _percent(right),
        "n_image": len(with_image),
        "accuracy_image": _percent(with_image),
        "unparsed": letters.count(None),
    }


# ---- MMBench and MMBench-CN ----


def mmbench_option(answer: str, options: dict[str, str]) -> str | None:
    r"""
    The option that an answer means: its letter stands alone in it, or else its text does; None when it is not one.

    An "A" in more than three words may be an article and is not taken. Rule: `can_infer` of VLMEvalKit
    (https://github.com/open-compass/VLMEvalKit), without the language model that it asks as a last resort.

    Args:
        answer (`str`)
        options (`dict[str, str]`): letter to text.
    """
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and not ("A" in words and len(words) > 3):
        return letters[0]
    texts = [letter for letter, text in options.items() if str(text).lower() in answer.lower()]
    return texts[0] if len(texts) == 1 else None


def score_mmbench(rows: list[dict]) -> dict:
    r"""
    Circular accuracy, where a question is right when it is under all rotations of its options, and that of the first.

    Rule: Liu et al. 2023 (https://arxiv.org/abs/2307.06281). MMBench-CN is scored alike.

    Args:
        rows (`list[dict]`): with `index`, the question's plus 1,000,000 for every rotation, and options `A`, `B`, ….
    """
    rotations = defaultdict(dict)
    for row in rows:
        # an empty cell is None, or NaN (which is not itself) where pandas read it
        options = {letter: row[letter] for letter in OPTION_LETTERS if row.get(letter) is not None}
        options = {letter: option for letter, option in options.items() if option == option}
        rotation, question = divmod(row["index"], MMBENCH_ROTATION)
        rotations[question][rotation] = mmbench_option(row["answer"], options) == row["label"]
    return {
        "rows": len(rows),
        "n": len(rotations),
        "circular": _percent(all(right.values()) for right in rotations.values()),
        "plain": _percent(right[0] for right in rotations.values()),
    }


# ---- MM-Vet ----


def score_mmvet(rows: list[dict], grade: str = "grade") -> dict:
    r"""
    Mean of a judge's grades, over all questions and over those that need a capability (a question may need several).

    Rule: Yu et al. 2023 (https://arxiv.org/abs/2308.02490).

    Args:
        rows (`list[dict]`): with `capability`, a list, and the grade, 0 to 1.
        grade (`str`, *optional*, defaults to `"grade"`): the key of the grade.

    Raises:
        `ValueError`: for a question without a grade, which must not count as 0.
    """
    for row in rows:
        if row.get(grade) is None or not 0 <= row[grade] <= 1:
            raise ValueError(f"MM-Vet question {row.get('question_id')}: {grade} is {row.get(grade)!r}, not in 0..1.")
    pairs = [{"capability": name, "grade": row[grade]} for row in rows for name in row["capability"]]
    return {
        "n": len(rows),
        "total": _percent(row[grade] for row in rows),
        "capability": _percent_by(pairs, "capability", lambda pair: pair["grade"]),
    }


# ---- MME ----


def mme_answer(answer: str) -> str:
    """`"yes"`, `"no"` or, where neither is in the first four characters, `"other"`, which is never right."""
    start = answer.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def score_mme(rows: list[dict]) -> dict:
    r"""
    Score of each task, the percentage of right questions plus that of images with both questions right, and the sums
    over the ten tasks of perception and the four of cognition.

    Rule: Fu et al. 2023 (https://arxiv.org/abs/2306.13394), the evaluation tool that comes with the benchmark.

    Args:
        rows (`list[dict]`): with `category`, the task, and `question_id`, the image; labels are yes and no.

    Raises:
        `ValueError`: for a image that has not two questions.
    """
    images = defaultdict(list)
    for row in rows:
        images[row["category"], row["question_id"]].append(mme_answer(row["answer"]) == _known(row["label"]))
    tasks = defaultdict(list)
    for (task, image), right in images.items():
        if len(right) != 2:
            raise ValueError(f"MME asks two questions about a image; {task} has {len(right)} about {image}.")
        tasks[task].append(right)
    scores = {
        task: _percent(right for pair in pairs for right in pair) + _percent(map(all, pairs))
        for task, pairs in sorted(tasks.items())
    }
    return {
        "n": len(rows),
        "perception": sum(score for task, score in scores.items() if task not in MME_COGNITION),
        "cognition": sum(score for task, score in scores.items() if task in MME_COGNITION),
        "category": scores,
    }


# ---- One answer at a time ----


def exact_match(answer: str, label: str) -> float:
    """1 when they are equal; capitals and blanks around them do not count."""
    return float(answer.strip().lower() == label.strip().lower())


# Name → function (answer, truth) → 0 to 1; the truth of the VQA scorers is ten answers.
SCORERS = {
    "exact": exact_match,
    "vqa": vqa_accuracy,
    "textvqa": textvqa_accuracy,
    "gqa": gqa_accuracy,
    "pope": lambda answer, label: float(pope_answer(answer) == _known(label)),
    "mme": lambda answer, label: float(mme_answer(answer) == _known(label)),
    "scienceqa": lambda answer, label: float(scienceqa_letter(answer) == _known(label, tuple(OPTION_LETTERS))),
}
# What these benchmarks report beyond a mean of scores
SUMMARIES = {"pope": score_pope, "mme": score_mme}
