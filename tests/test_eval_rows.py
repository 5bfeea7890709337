# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The rows, columns and options of `vtlmm eval`, and errors that name them."""

import json
import shutil

import pytest
from helpers.evaluation import (  # noqa: F401 - fixtures
    FILES,
    NUM_IMAGES,
    QUESTIONS_PER_IMAGE,
    arguments,
    finished,
    read_files,
    records,
    save_model,
    work,
)

from vtlmm.cli.main import main
from vtlmm.evaluation.runner import evaluate
from vtlmm.hub.export_llava import export_to_llava
from vtlmm.inference.loading import load_model


@pytest.mark.parametrize("value", [3, None, True, 2.5])
def test_ground_truth_that_is_not_a_text_is_never_empty(work, tmp_path, capsys, value):
    rows = [{"image": "0.png", "question": "how many", "answer": value, "kind": "a"}]
    rows.append({"image": "1.png", "question": "what color", "answer": "red", "kind": "a"})
    (work / "numbers.json").write_text(json.dumps(rows))
    code = main(arguments(work, tmp_path / "out", data="numbers.json"))
    if code == 0:
        assert [record["truth"] for record in records(tmp_path / "out" / "answers.jsonl")] == [str(value), "red"]
    else:
        assert "row 0" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_invalid_rows_stop_before_the_first_answer(work, tmp_path):
    model, processor = load_model(work / "model0")
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"question": "what", "answer": "red"}, {"question": "what </s>", "answer": "red"}]))
    with pytest.raises(ValueError, match="row 1"):
        evaluate(model, processor, rows, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_skipped_rows_are_reported(work, tmp_path):
    model, processor = load_model(work / "model0")
    rows = [{"question": text, "answer": "red"} for text in ("what </s>", "what", "is it", "it <s>")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    result = evaluate(model, processor, tmp_path / "rows.json", output=tmp_path / "out", bad_rows="skip")
    assert (result.num_rows, result.num_questions, {problem.row for problem in result.skipped}) == (4, 2, {0, 3})
    assert "4 rows read, 2 questions" in result.to_markdown() and "2 rows left out: control" in result.to_markdown()
    assert [record["row"] for record in records(tmp_path / "out" / "answers.jsonl")] == [1, 2]
    assert any(
        text.startswith("row 3: control token")
        for text in json.loads((tmp_path / "out" / "results.json").read_text())["skipped"]
    )


def test_question_beyond_the_position_limit_names_its_row(work, tmp_path):
    model, processor = load_model(work / "model0")
    model.config.text_config.max_position_embeddings = 30
    rows = [{"question": "what " * n, "answer": "red"} for n in (2, 40)]
    with pytest.raises(ValueError, match="needs 47 tokens, and the decoder has 30 positions.*\n.*row 1: too long"):
        evaluate(model, processor, rows, output=tmp_path / "out")
    result = evaluate(model, processor, rows, bad_rows="skip", max_new_tokens=2)
    assert (result.num_questions, [problem.row for problem in result.skipped]) == (1, [1])
    # the ending of a benchmark's prompt needs positions too
    rows = [{"question": "what " * n, "answer": "red"} for n in (2, 22)]
    assert evaluate(model, processor, rows, max_new_tokens=2).num_questions == 2
    result = evaluate(model, processor, rows, bad_rows="skip", prompt="vqav2", max_new_tokens=2)
    assert [problem.row for problem in result.skipped] == [1]


@pytest.mark.parametrize(
    "options", [{"limit": 0}, {"batch_size": 0}, {"max_new_tokens": 0}, {"max_new_tokens": -3}, {"seed": -1}]
)
def test_numbers_out_of_range_are_named(work, options):
    model, processor = load_model(work / "model0")
    [name] = options
    with pytest.raises(ValueError, match=f"`{name}` is -?\\d. It must be a whole number of at least [01]"):
        evaluate(model, processor, work / "rows.jsonl", **options)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.json", "[]", "run.json must hold an object, not a list"),
        ("run.json", '{"key": 3}', "run.json: `key` must be an object, but is a number"),
        ("run.json", "{", "run.json is not valid JSON"),
        ("answers.jsonl", "[]\n", "answers.jsonl, line 1 must hold an object, not a list"),
        ("answers.jsonl", "{\n", "answers.jsonl, line 1 is not JSON"),
        ("answers.jsonl", '{"index": "0", "answer": "a"}\n', "`index` must be a number, but is a text"),
    ],
)
def test_damaged_files_of_a_run_are_named(work, finished, tmp_path, capsys, file, text, message):
    for name in FILES[:3]:
        shutil.copy(finished / name, tmp_path / name)
    (tmp_path / file).write_text(text)
    assert main(arguments(work, tmp_path)) == 1
    assert message in capsys.readouterr().err
    assert main(["compare", str(finished), str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dataset", "image_folder"])
def test_an_output_that_is_an_input_is_refused(work, tmp_path, name):
    model, processor = load_model(work / "model0")
    given = {"dataset": work / "rows.jsonl", name: tmp_path}
    with pytest.raises(ValueError, match=f"is also the input `{name}`"):
        evaluate(model, processor, output=tmp_path, **given)


def test_columns_are_renamed(work, tmp_path):
    rows = [{"photo": f"{i}.png", "ask": "what is it", "reply": "red", "note": "a.png"} for i in range(2)]
    (work / "renamed.json").write_text(json.dumps(rows))
    options = ["--max-new-tokens", "2", "--columns", "image=photo,question=ask,answer=reply,note="]
    command = ["eval", str(work / "model0"), "--dataset", str(work / "renamed.json")]
    assert main([*command, "--output", str(tmp_path / "out"), *options]) == 0
    assert [record["truth"] for record in records(tmp_path / "out/answers.jsonl")] == ["red", "red"]


def test_template_without_answer_marks_is_accepted(work, finished, tmp_path):
    """Marks for supervised answers are for training. An exported LLaVA has a template without them."""
    model, processor = load_model(work / "model0")
    template = processor.chat_template
    processor.chat_template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert processor.chat_template != template
    result = evaluate(model, processor, work / "rows.jsonl", kind="kind", max_new_tokens=4)
    assert result.answers == [record["answer"] for record in records(finished / "answers.jsonl")]


def test_exported_llava_gives_the_same_answers(work, tmp_path):
    export_to_llava(work / "model0", tmp_path / "llava")
    answers = []
    for name in (work / "model0", tmp_path / "llava"):
        model, processor = load_model(name)
        model.generation_config.suppress_tokens = [processor.image_token_id]  # the export sets it
        answers.append(evaluate(model, processor, work / "rows.jsonl", max_new_tokens=4).answers)
    assert answers[0] == answers[1] and len(set(answers[0])) > 5


def test_tower_encodes_each_image_once(work, finished, monkeypatch):
    model, processor = load_model(work / "model0")
    encoded, forward = [], model.model.vision_tower.forward

    def count(pixel_values, **kwargs):
        encoded.append(len(pixel_values))
        return forward(pixel_values, **kwargs)

    monkeypatch.setattr(model.model.vision_tower, "forward", count)
    result = evaluate(model, processor, work / "rows.jsonl", kind="kind", max_new_tokens=4)
    assert result.answers == [record["answer"] for record in records(finished / "answers.jsonl")]
    assert sum(encoded) == NUM_IMAGES and "| all |" in result.to_markdown()
