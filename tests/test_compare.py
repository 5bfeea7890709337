# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm compare`: paired differences, and runs that cannot be compared."""

import json

import pytest
from helpers.evaluation import NUM_IMAGES, arguments, finished, records, work  # noqa: F401 - fixtures

from vtlmm.cli.main import main
from vtlmm.evaluation.compare import compare_results


def test_compare_pairs_the_questions_of_two_runs(work, finished, tmp_path, capsys):
    other = tmp_path / "other"
    assert main(arguments(work, other, model="model1")) == 0
    # the second run's answers to kind 0 become the ground truths of both runs
    for folder in (finished, other):
        copy = tmp_path / f"{folder.name} copy"
        copy.mkdir()
        (copy / "results.json").write_bytes((folder / "results.json").read_bytes())
        run = json.loads((folder / "run.json").read_text()) | {"subset": "the first 18 of 20 rows"}
        (copy / "run.json").write_text(json.dumps(run))
        changed = []
        for record, second in zip(records(folder / "answers.jsonl"), records(other / "answers.jsonl"), strict=True):
            truth = second["answer"] if record["kind"] == "kind 0" else "never an answer"
            changed.append(json.dumps({**record, "truth": truth, "question": ""}) + "\n")  # only an image
        (copy / "answers.jsonl").write_text("".join(changed))
    copies = [str(tmp_path / f"{folder.name} copy") for folder in (finished, other)]
    capsys.readouterr()
    assert main(["compare", *copies, "--output", str(tmp_path / "compared")]) == 0
    comparison = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    lines = {line["kind"]: line for line in comparison["kinds"]}
    agreeing = NUM_IMAGES - len(comparison["flips"])
    assert lines["kind 0"]["second"] == 1 and lines["kind 0"]["first"] == agreeing / NUM_IMAGES
    assert len(comparison["flips"]) == lines["all"]["test"]["second_better"] > 3
    assert lines["all"]["test"]["first_better"] == 0
    assert (
        lines["kind 0"]["test"]["p_value"] == 2 / 2 ** len(comparison["flips"])
        and lines["kind 1"]["test"]["p_value"] == 1
    )
    difference = lines["kind 1"]["difference"]
    assert difference["value"] == 0 and difference["high"] == -difference["low"] > 0.3  # only six images
    printed = capsys.readouterr().out
    assert "| kind 0 | 6 |" in printed and "SUBSET: the first 18 of 20 rows" in printed
    assert comparison["subset"] == "the first 18 of 20 rows"

    answers = tmp_path / "other copy" / "answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:-1]))
    assert main(["compare", *copies]) == 1
    assert "is not finished (17 of 18 answers)" in capsys.readouterr().err
    assert main(["compare", copies[0], str(tmp_path)]) == 1
    assert "holds no evaluation" in capsys.readouterr().err


def test_runs_with_different_questions_or_scorers_are_refused(work, finished, tmp_path):  # noqa: F811
    assert main(arguments(work, tmp_path / "gqa", "--scorer", "gqa")) == 0
    with pytest.raises(ValueError, match="has the scorer exact, .* has gqa"):
        compare_results(finished, tmp_path / "gqa")
    assert main(arguments(work, tmp_path / "some", "--limit", "4")) == 0
    with pytest.raises(ValueError, match="have different questions"):
        compare_results(finished, tmp_path / "some")


@pytest.mark.slow
def test_runs_may_name_other_kinds(work, finished, tmp_path):  # noqa: F811
    other = [word for word in arguments(work, tmp_path / "other") if word not in ("--kind", "kind")]
    assert main(other) == 0
    comparison = compare_results(finished, tmp_path / "other")
    assert [line.kind for line in comparison.kinds] == ["kind 0", "kind 1", "kind 2", "all"]
    assert [line.kind for line in compare_results(tmp_path / "other", finished).kinds] == ["all"]
