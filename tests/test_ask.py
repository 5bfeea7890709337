# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm ask`: one question on stdout, and files of questions that resume."""

import fcntl
import json
import os
import re

import pytest
from datasets import Dataset, Features, Image, Value
from helpers.inference import COLORS, QUESTION, expected_answer, model_and_processor, work  # noqa: F401 - fixtures
from PIL import Image as PILImage
from PIL import ImageOps

from vtlmm.cli.main import main
from vtlmm.inference import resumable
from vtlmm.inference.batch_file import answer_file
from vtlmm.inference.loading import load_model


def test_stdout_has_only_the_answer(work, model_and_processor, capfd):
    command = ["ask", str(work / "model"), str(work / "red.png"), QUESTION, "--max-new-tokens", "6"]
    assert main(command) == 0
    answer = expected_answer(*model_and_processor, QUESTION, "red", folder=work)
    assert capfd.readouterr().out == f"{answer}\n" and len(answer.split()) == 6
    assert main([*command, "--use-pseudo-image-features"]) == 0
    assert capfd.readouterr().out not in ("", f"{answer}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["broken.png", QUESTION], "broken.png: the file is not an image"),
        (["model", QUESTION], "model is a folder, not an image file"),
        (["nowhere.png", QUESTION], "nowhere.png: the image file does not exist"),
        (["red.png"], "The question is missing"),
        (["what " * 60], "Repo id must use"),  # longer than a file name can be
        ([], "The question is missing"),
        (["red.png", QUESTION, "--dataset", "rows.json"], "the questions come from its rows"),
        (["--dataset", "rows.json"], "--dataset needs --output"),
        (["red.png", QUESTION, "--output", "a.jsonl"], "--output has no effect without --dataset"),
        (["red.png", QUESTION, "--columns", "image=photo"], "--columns has no effect without --dataset"),
        (["--dataset", "q.json", "--output", "a.jsonl", "--columns", "photo"], "Write the name of the format first"),
        (["--dataset", "q.json", "--output", "a.jsonl", "--columns", "a=b"], "the name 'a', which no format has"),
    ],
)
def test_invalid_arguments_fail_before_the_model_loads(work, capfd, arguments, message):
    paths = [str(work / text) if os.path.exists(work / text) or text == "nowhere.png" else text for text in arguments]
    assert main(["ask", "no model", *paths]) == 1
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and message in printed.err


def write_rows(work, path) -> list[dict]:
    rows = [
        {"id": 7 * i, "image": f"{color}.png", "question": "what " * (i % 3 + 1)} for i, color in enumerate(COLORS)
    ]
    rows.append({"question": "hello", "images": []})
    rows.append({"question": "yes or no ?", "images": ["red.png", "blue.png"]})
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    else:
        table = [{"question": row["question"], "image": str(work / row["image"])} for row in rows if "image" in row]
        features = Features({"question": Value("string"), "image": Image()})
        Dataset.from_list(table).cast(features).to_parquet(path)  # with the images in it
        rows = rows[: len(table)]
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_file_of_questions_is_answered_and_resumed(work, model_and_processor, tmp_path, kind):
    data, output = tmp_path / f"rows.{kind}", tmp_path / "out" / "answers.jsonl"
    rows = write_rows(work, data)
    command = [
        "ask",
        str(work / "model"),
        "--dataset",
        str(data),
        "--image-folder",
        str(work),
        "--output",
        str(output),
    ]
    command += ["--max-new-tokens", "6", "--batch-size", "2"]
    assert main(command) == 0
    records = sorted(map(json.loads, output.read_text().splitlines()), key=lambda record: record["index"])
    for row, record in zip(rows, records, strict=True):
        images = row["images"] if "images" in row else [row["image"]]
        colors = [name.removesuffix(".png") for name in images]
        answer = expected_answer(*model_and_processor, row["question"], *colors, folder=work)
        assert record["answer"] == answer and record["question"] == row["question"] and "truth" not in record
        assert record.get("id") == (None if kind == "parquet" else row.get("id"))
    assert len({record["answer"] for record in records}) > 3

    # as if killed after one batch, while a line was written
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:10])
    assert main(command) == 0 and output.read_bytes() == whole
    # answers of two models or of two files are never mixed
    assert main([*command, "--use-pseudo-image-features"]) == 1 and main([*command[:-3], "5"]) == 1
    # also not for other images with the same names
    other = tmp_path / "other"
    other.mkdir()
    for color in COLORS:
        ImageOps.invert(PILImage.open(work / f"{color}.png").convert("RGB")).save(other / f"{color}.png")
    write_rows(other, data)
    assert main([str(other) if option == str(work) else option for option in command]) == 1
    assert output.read_bytes() == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"image": "red.png"}]', "row 0 has columns ['image'], which match no supported format"),
        ('[{"question": "what", "image": "nowhere.png"}]', "row 0: missing image: the file does not exist"),
        ('{"question": "what"}', "must hold a list of rows"),
        ("[]", "has no rows"),
        ('{"question": "what"}\n\n{"question"', "rows.jsonl, line 3 is not JSON"),
    ],
)
def test_invalid_rows_of_a_file_are_named(work, tmp_path, capfd, text, message):
    data = tmp_path / ("rows.jsonl" if "rows.jsonl" in message else "rows.json")
    data.write_text(text)
    assert main(["ask", str(work / "model"), "--dataset", str(data), "--output", str(tmp_path / "a.jsonl")]) == 1
    assert message in capfd.readouterr().err and not (tmp_path / "a.jsonl").exists()


def write_json(path, rows) -> str:
    path.write_text(json.dumps(rows))
    return str(path)


def test_image_marks_are_the_places_of_images(work, model_and_processor, tmp_path):
    """A question file of LLaVA has `<image>` in its questions."""
    rows = [{"image": "red.png", "question": "what " * (i + 1)} for i in range(4)]
    rows.append({"image": "red.png", "question": "<image>\nwhat is it on the left ?"})
    data = write_json(tmp_path / "q.json", rows)
    answers = answer_file(
        *model_and_processor, data, tmp_path / "a.jsonl", image_folder=work, batch_size=2, max_new_tokens=4
    )
    assert len(answers) == 5
    expected = expected_answer(*model_and_processor, "what is it on the left ?", "red", length=4, folder=work)
    assert answers[4] == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "broken.png", "question": "what"}, "row 1: broken image"),
        ({"image": "red.png", "question": "<image> or <image> ?"}, "row 1: image count: 2 marks, 1 images"),
        ({"question": "what </s>"}, "row 1: control token: message 0 contains '</s>'"),
        ({"question": 3}, "row 1: text: the text of message 0 is not a string"),
    ],
)
def test_invalid_row_stops_before_the_first_answer(work, model_and_processor, tmp_path, row, message):
    data = write_json(tmp_path / "q.json", [{"image": "red.png", "question": "what"}, row])
    with pytest.raises(ValueError, match=re.escape(message)):
        answer_file(*model_and_processor, data, tmp_path / "a.jsonl", image_folder=work)
    assert not (tmp_path / "a.jsonl").exists()


def test_answers_of_two_files_of_one_name_are_two_runs(model_and_processor, tmp_path):
    for name, question in (("a.json", "what"), ("a.jsonl", "hello")):
        data = write_json(tmp_path / "q.json", [{"question": question}])
        assert len(answer_file(*model_and_processor, data, tmp_path / name, max_new_tokens=2)) == 1
    assert {"a.json.run.json", "a.jsonl.run.json"} <= {path.name for path in tmp_path.iterdir()}


def test_an_output_that_is_the_input_is_refused(model_and_processor, tmp_path):
    data = write_json(tmp_path / "q.json", [{"question": "what", "id": float("nan")}])
    with pytest.raises(ValueError, match="is also the input `dataset`"):
        answer_file(*model_and_processor, data, tmp_path / "../" / tmp_path.name / "q.json")
    assert json.loads((tmp_path / "q.json").read_text())[0]["question"] == "what"
    answer_file(*model_and_processor, data, tmp_path / "a.jsonl", max_new_tokens=2)
    assert "NaN" not in (tmp_path / "a.jsonl").read_text()


def test_a_question_beyond_the_positions_names_its_row(work, tmp_path):
    model, processor = load_model(work / "model")
    model.config.text_config.max_position_embeddings = 30
    data = write_json(tmp_path / "q.json", [{"question": "what"}, {"question": "what " * 40}])
    with pytest.raises(ValueError, match="row 1: too long"):
        answer_file(model, processor, data, tmp_path / "a.jsonl")


def test_columns_are_renamed(work, tmp_path, capfd):
    data = write_json(tmp_path / "q.json", [{"photo": "red.png", "ask": "what is it ?"}])
    command = ["ask", str(work / "model"), "--dataset", data, "--output", str(tmp_path / "a.jsonl")]
    command += ["--image-folder", str(work), "--max-new-tokens", "2"]
    assert main(command) == 1 and "match no supported format" in capfd.readouterr().err
    assert main([*command, "--columns", "image=photo,question=ask"]) == 0
    assert json.loads((tmp_path / "a.jsonl").read_text())["images"] == ["red.png"]
    assert main([*command, "--columns", "image=picture,question=ask"]) == 1
    assert "has no column ['picture'], which `columns` names" in capfd.readouterr().err


def test_second_writer_of_an_answer_file_is_refused(model_and_processor, tmp_path):
    data, output = write_json(tmp_path / "q.json", [{"question": "what"}]), tmp_path / "a.jsonl"
    lock = tmp_path / ".a.jsonl.lock"
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="Another process is writing to .*a.jsonl"):
            answer_file(*model_and_processor, data, output)
    assert not output.exists() and len(answer_file(*model_and_processor, data, output, max_new_tokens=2)) == 1


@pytest.mark.slow
def test_auto_batch_size_fits_the_memory(work, model_and_processor, tmp_path, monkeypatch):
    """`--batch-size auto` halves the batch after an error about memory, and gives the same answers."""
    data, sizes, generate = tmp_path / "rows.json", [], resumable.generate_batch
    write_rows(work, data)

    def small_memory(model, processor, prompts, *args, **kwargs):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise RuntimeError("CUDA out of memory.")
        return generate(model, processor, prompts, *args, **kwargs)

    monkeypatch.setattr(resumable, "AUTO_BATCH_SIZES", (8, 4, 2, 1))
    monkeypatch.setattr(resumable, "generate_batch", small_memory)
    options = {"image_folder": work, "max_new_tokens": 6}
    found = answer_file(*model_and_processor, data, tmp_path / "auto.jsonl", batch_size="auto", **options)
    assert sizes[0] > 2 and sizes[-1] <= 2 and max(sizes[2:]) == 2
    assert found == answer_file(*model_and_processor, data, tmp_path / "one.jsonl", batch_size=1, **options)
    with pytest.raises(ValueError, match="batch_size"):
        answer_file(*model_and_processor, data, tmp_path / "no.jsonl", batch_size="all", **options)
