# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Two finished runs over the same questions: how much better is one, how sure is that, and which answers changed."""

import json
from pathlib import Path

from vtlmm.inference.resumable import finished_answers

from .report import RESULTS_FILE, by_kind, image_cluster, score_answers
from .runner import ANSWERS_FILE, RUN_FILE
from .statistics import bootstrap_interval, mcnemar


def read_run(folder: str | Path) -> tuple[dict, dict, list[dict]]:
    """`run.json`, `results.json` and the records of a finished run, in the order of its rows.

    Raises:
        `FileNotFoundError`: where there is no run.
        `ValueError`: when it is not finished."""
    folder = Path(folder)
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    records = [record for record, _ in finished_answers(folder / ANSWERS_FILE)]
    if len(records) < run["num_questions"] or not (folder / RESULTS_FILE).is_file():
        raise ValueError(
            f"{folder} is not finished ({len(records)} of {run['num_questions']} answers): run its command again."
        )
    results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    return run, results, sorted(records, key=lambda record: record["index"])


def compare_runs(first: str | Path, second: str | Path) -> dict:
    r"""
    The second run against the first, question by question.

    Args:
        first, second (`str` or `Path`): folders of finished runs over the same rows, by the same scorer.

    Returns:
        `dict`: `subset`, what part of the data both are over if not all; `kinds`, with `n`, both scores, the
        `difference` with its 95 % interval by bootstrap over images (`low`, `high`), and McNemar's `first_better`,
        `second_better`, `p`; `flips`, questions whose scores differ.

    Raises:
        `ValueError`: for runs that cannot be compared.
    """
    (first_run, first_results, first_records), (second_run, second_results, second_records) = map(
        read_run, (first, second)
    )
    if first_run["key"]["rows"] != second_run["key"]["rows"]:
        raise ValueError(f"{first} and {second} are over different rows: only the same questions can be paired.")
    scorer = first_results["scorer"]
    if scorer != second_results["scorer"]:
        raise ValueError(f"{first} is scored by {scorer}, {second} by {second_results['scorer']}: score them alike.")
    questions = [{**record, "answer": record["truth"]} for record in first_records]
    scores = [
        score_answers(questions, [record["answer"] for record in records], scorer)
        for records in (first_records, second_records)
    ]
    clusters = [image_cluster(question) for question in questions]
    kinds = []
    for kind, chosen in by_kind(questions).items():
        a, b = ([values[i] for i in chosen] for values in scores)
        differences = [y - x for x, y in zip(a, b, strict=True)]
        low, high = bootstrap_interval(differences, [clusters[i] for i in chosen])
        first_better, second_better, p = mcnemar(a, b)
        kinds.append(
            {
                "kind": kind,
                "n": len(chosen),
                "first": sum(a) / len(a),
                "second": sum(b) / len(b),
                "difference": sum(differences) / len(differences),
                "low": low,
                "high": high,
                "first_better": first_better,
                "second_better": second_better,
                "p": p,
            }
        )
    flips = [
        {
            **{name: question[name] for name in ("index", "kind", "question", "truth")},
            "first": first_records[i]["answer"],
            "second": second_records[i]["answer"],
            "scores": [scores[0][i], scores[1][i]],
        }
        for i, question in enumerate(questions)
        if scores[0][i] != scores[1][i]
    ]
    runs = {"first": str(first), "second": str(second), "subset": first_run.get("subset"), "scorer": scorer}
    return {**runs, "kinds": kinds, "flips": flips}


def format_comparison(comparison: dict) -> str:
    """The table in Markdown."""
    text = [f"SUBSET: {comparison['subset']}", ""] if comparison["subset"] else []
    text += ["| kind | n | first | second | difference | 95 % | first better | second better | p |"]
    text.append("|---|---|---|---|---|---|---|---|---|")
    for line in comparison["kinds"]:
        scores = f"{line['first']:.1%} | {line['second']:.1%} | {line['difference']:+.1%}"
        interval = f"{line['low']:+.1%} – {line['high']:+.1%}"
        text.append(
            f"| {line['kind']} | {line['n']} | {scores} | {interval} | {line['first_better']} | "
            f"{line['second_better']} | {line['p']:.2g} |"
        )
    return "\n".join(text)
