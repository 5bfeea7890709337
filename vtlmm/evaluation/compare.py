# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Compare two evaluations of the same questions: the difference, its interval, and the answers that changed."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vtlmm.data.json_files import read_json
from vtlmm.data.markdown import markdown_table
from vtlmm.data.output_files import write_json
from vtlmm.inference.resumable import finished_answers

from .prompts import remove_prompt
from .report import RESULTS_FILE, by_kind, image_cluster
from .runner import ANSWERS_FILE, RUN_FILE
from .scorers import score_answers
from .statistics import DIFFERENCE_BOUNDS, Estimate, McNemarTest, mcnemar, mean_estimate


COMPARISON_FILE = "comparison.json"


@dataclass
class KindComparison:
    """
    Scores of two evaluations on the questions of one kind.

    Attributes:
        kind (`str`), n (`int`): the kind and its number of questions.
        first, second (`float`): mean scores, 0 to 1.
        difference ([`Estimate`]): second minus first, with the bootstrap interval over images.
        test ([`McNemarTest`]): number of questions where only one is better, and the exact p-value.
    """

    kind: str
    n: int
    first: float
    second: float
    difference: Estimate
    test: McNemarTest


@dataclass
class Flip:
    """A question that the two evaluations answered with different scores."""

    index: int
    kind: str
    question: str
    truth: str | list[str]
    first: str
    second: str
    first_score: float
    second_score: float


@dataclass
class Comparison:
    """Result of [`compare_results`]. `subset` is the part of the dataset that both evaluations used, if not all."""

    first: str
    second: str
    scorer: str
    subset: str | None
    kinds: list[KindComparison]
    flips: list[Flip]

    def to_markdown(self) -> str:
        """Return the table of differences by kind of question."""
        rows = []
        for line in self.kinds:
            difference, test = line.difference, line.test
            rows.append(
                [line.kind, line.n, f"{line.first:.1%}", f"{line.second:.1%}", f"{difference.value:+.1%}"]
                + [f"{difference.low:+.1%} – {difference.high:+.1%}", test.first_better, test.second_better]
                + [f"{test.p_value:.2g}"]
            )
        header = ["kind", "n", "first", "second", "difference", "95 %", "first better", "second better", "p"]
        lines = [f"SUBSET: {self.subset}", ""] if self.subset else []
        return "\n".join([*lines, markdown_table(header, rows)])

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `comparison.json` and return its path."""
        content = asdict(self)
        for line, kind in zip(content["kinds"], self.kinds, strict=True):
            line["test"] = kind.test._asdict()
        path = Path(folder, COMPARISON_FILE)
        write_json(path, content)
        return path


@dataclass
class _Run:
    """A finished evaluation: its `run.json`, its `results.json`, and the records of its answers in order."""

    run: dict[str, Any]
    results: dict[str, Any]
    records: list[dict[str, Any]]


def compare_results(first: str | os.PathLike, second: str | os.PathLike) -> Comparison:
    r"""
    Compare the second evaluation with the first, question by question.

    Args:
        first, second (`str`): output folders of [`evaluate`] for the same questions and the same scorer. The kinds are
            those of the first.

    Raises:
        `FileNotFoundError`: if a folder holds no evaluation.
        `ValueError`: if an evaluation is not finished, or the two have different questions or scorers.
    """
    runs = [_read_run(Path(folder)) for folder in (first, second)]
    questions, others = (_questions(run) for run in runs)
    # A run can name another column of kinds than the other run, and then has other rows.
    identities = [[(one["images"], one["question"], one["answer"]) for one in asked] for asked in (questions, others)]
    if identities[0] != identities[1]:
        raise ValueError(f"{first} and {second} have different questions. Evaluate both models on the same rows.")
    scorer, other = (run.results["scorer"] for run in runs)
    if scorer != other:
        raise ValueError(f"{first} has the scorer {scorer}, {second} has {other}. Use one scorer for both.")
    scores = [score_answers(questions, [record["answer"] for record in run.records], scorer) for run in runs]
    clusters = [image_cluster(question) for question in questions]
    kinds = [
        _compare_kind(
            kind,
            [scores[0][i] for i in chosen],
            [scores[1][i] for i in chosen],
            [clusters[i] for i in chosen],
        )
        for kind, chosen in by_kind(questions).items()
    ]
    flips = [
        Flip(
            *(question[name] for name in ("index", "kind", "question", "answer")),
            *(run.records[i]["answer"] for run in runs),
            *(values[i] for values in scores),
        )
        for i, question in enumerate(questions)
        if scores[0][i] != scores[1][i]
    ]
    return Comparison(os.fspath(first), os.fspath(second), scorer, runs[0].run.get("subset"), kinds, flips)


def _questions(run: _Run) -> list[dict[str, Any]]:
    """Return the questions of a run without its prompt, with their true answers."""
    prompt = run.run["key"]["settings"]["prompt"]
    return [
        {**record, "answer": record["truth"], "question": remove_prompt(prompt, record["question"])}
        for record in run.records
    ]


def _compare_kind(kind: str, first: Sequence[float], second: Sequence[float], clusters: list[str]) -> KindComparison:
    differences = [b - a for a, b in zip(first, second, strict=True)]
    return KindComparison(
        kind=kind,
        n=len(first),
        first=sum(first) / len(first),
        second=sum(second) / len(second),
        difference=mean_estimate(differences, clusters, bounds=DIFFERENCE_BOUNDS),
        test=mcnemar(first, second),
    )


def _read_run(folder: Path) -> _Run:
    if not (folder / RUN_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no evaluation ({RUN_FILE}). Give an output folder of `vtlmm eval`.")
    run = read_json(folder / RUN_FILE, entries={"key": dict, "num_questions": int})
    records = [record for record, _ in finished_answers(folder / ANSWERS_FILE)]
    if len(records) < run["num_questions"] or not (folder / RESULTS_FILE).is_file():
        raise ValueError(
            f"{folder} is not finished ({len(records)} of {run['num_questions']} answers). Run its command again."
        )
    results = read_json(folder / RESULTS_FILE, entries={"scorer": str})
    return _Run(run, results, sorted(records, key=lambda record: record["index"]))
