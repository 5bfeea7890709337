# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm eval`: the same answers however it is batched or stopped, its controls and intervals, and what it refuses."""

import csv
import json
import multiprocessing
import os
import random
import re
import signal
import time

import numpy as np
import pytest
import torch
from conftest import WORDS, build_config, build_processor
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import ExifTags
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.cli.eval import check_submission
from vtlmm.cli.main import main
from vtlmm.data.images import image_key, open_image
from vtlmm.data.questions import split_questions
from vtlmm.data.rows import load_rows
from vtlmm.evaluation.questions import read_questions
from vtlmm.evaluation.report import SAMPLES_FILE, by_kind, score_answers
from vtlmm.evaluation.runner import evaluate
from vtlmm.evaluation.statistics import bootstrap_interval, mcnemar
from vtlmm.inference.generation import (
    accuracy_by_kind,
    answer,
    conversation,
    generate_batch,
    with_shuffled_images,
)
from vtlmm.inference.loading import load_model


NUM_IMAGES, QUESTIONS_PER_IMAGE = 6, 3
FILES = ("run.json", "answers.jsonl", "blind.jsonl", "results.json", "results.csv", SAMPLES_FILE)


def save_model(folder, seed: int) -> None:
    """Weights large enough that answers depend on the image."""
    torch.manual_seed(seed)
    model = VTLMMForConditionalGeneration(build_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two tiny models, and questions about images: an own kind and length each."""
    folder = tmp_path_factory.mktemp("eval")
    for seed in (0, 1):
        save_model(folder / f"model{seed}", seed)
    rng = random.Random(0)
    rows = []
    for i in range(NUM_IMAGES):
        PILImage.new("RGB", (28, 28), tuple(rng.randrange(256) for _ in range(3))).save(folder / f"{i}.png")
        for j in range(QUESTIONS_PER_IMAGE):
            question = " ".join(rng.choices(WORDS, k=1 + (i + j) % 5))
            rows.append({"image": f"{i}.png", "question": question, "answer": rng.choice(WORDS), "kind": f"kind {j}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(work, output, *more, model: str = "model0", data: str = "rows.jsonl") -> list[str]:
    options = ["--kind", "kind", "--max-new-tokens", "4", "--output", str(output), *more]
    return ["eval", str(work / model), "--dataset", str(work / data), *options]


@pytest.fixture(scope="module")
def finished(work):
    """A run that nothing disturbed."""
    assert main(arguments(work, work / "finished")) == 0
    return work / "finished"


def read_files(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def records(path) -> list[dict]:
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda record: record["index"])


# ---- The answers ----


def test_batches_give_the_answers_of_one_by_one(work, finished, tmp_path):
    assert main(arguments(work, tmp_path / "out", "--batch-size", "1")) == 0
    assert read_files(tmp_path / "out") == read_files(finished)
    assert len({record["answer"] for record in records(finished / "answers.jsonl")}) > 5


def test_a_killed_run_goes_on_to_the_same_files(work, finished, tmp_path, monkeypatch):
    """SIGKILL in the middle, and as if it had hit the writing of a line."""

    def slow_answers(*args, **kwargs):
        time.sleep(0.05)  # or the kill might come too late
        return generate_batch(*args, **kwargs)

    monkeypatch.setattr("vtlmm.inference.resumable.generate_batch", slow_answers)
    command = arguments(work, tmp_path / "out", "--batch-size", "1")
    process = multiprocessing.get_context("fork").Process(target=main, args=(command,))  # spawned, it imports for long
    process.start()
    answers, deadline = tmp_path / "out" / "answers.jsonl", time.monotonic() + 120
    while not (answers.is_file() and answers.read_bytes().count(b"\n") >= 2):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = answers.read_bytes()
    assert done.count(b"\n") < NUM_IMAGES * QUESTIONS_PER_IMAGE and not (tmp_path / "out" / "results.json").exists()
    answers.write_bytes(done + b'{"index": 1, "ans')
    assert main(arguments(work, tmp_path / "out", "--batch-size", "4")) == 0
    assert read_files(tmp_path / "out") == read_files(finished)


def test_a_finished_run_is_not_answered_again(work, finished, monkeypatch):
    before = read_files(finished)
    monkeypatch.setattr("vtlmm.inference.resumable.generate_batch", None)
    assert main(arguments(work, finished)) == 0
    assert read_files(finished) == before


def test_runs_are_never_mixed(work, finished, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text((work / "rows.jsonl").read_text().replace("kind 0", "kind 9"))
    changes = {
        "weights": (arguments(work, finished, model="model1"), "weights differ"),
        "rows": (arguments(work, finished, "--image-folder", str(work), data=tmp_path / "rows.jsonl"), "(rows differ"),
        "prompt": (arguments(work, finished, "--prompt", "vqav2"), "(prompts, settings differ"),
        "length": (arguments(work, finished, "--max-new-tokens", "5"), "(settings differ"),
    }
    for command, message in changes.values():
        assert main(command) == 1
        assert message in capsys.readouterr().err
    # a copy of the model's folder is the same model
    (work / "copy").symlink_to(work / "model0")
    assert main(arguments(work, finished, model="copy")) == 0


def test_a_checkpoint_that_lacks_a_tensor_is_refused(work, tmp_path, capsys):
    save_model(tmp_path / "model", 0)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj" in name and "language_model" in name)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    assert main(arguments(work, tmp_path / "out", model=tmp_path / "model")) == 1
    assert f"lacks 1 tensors of VTLMMForConditionalGeneration, e.g. {name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- What is reported ----


def test_the_report_agrees_with_the_answers(work, finished):
    """Scores by a second way, one table in three files, and a page that needs no other file."""
    results = json.loads((finished / "results.json").read_text())
    found, blind = records(finished / "answers.jsonl"), records(finished / "blind.jsonl")
    questions = [{"kind": record["kind"], "answer": record["truth"]} for record in found]
    accuracy = accuracy_by_kind(questions, [record["answer"] for record in found])
    control = accuracy_by_kind(questions, [record["answer"] for record in blind])
    for line in results["kinds"]:
        assert (line["score"], line["n"]) == accuracy[line["kind"]] and line["blind"] == control[line["kind"]][0]
        assert line["low"] <= line["score"] <= line["high"] and line["images"] == NUM_IMAGES
    assert [line["kind"] for line in results["kinds"]] == ["kind 0", "kind 1", "kind 2", "all"]
    with open(finished / "results.csv", newline="") as file:
        assert [line["score"] for line in csv.DictReader(file)] == [str(line["score"]) for line in results["kinds"]]
    assert all(a["images"] != b["images"] for a, b in zip(found, blind, strict=True))
    page = (finished / SAMPLES_FILE).read_text()
    assert page.count('src="data:image/jpeg;base64,') == len(found) == page.count("<b>truth</b>")
    assert "http" not in page and results["subset"] is None


def test_answers_are_those_of_the_model(work, finished):
    """Through the command as through the function that the demo uses."""
    model = VTLMMForConditionalGeneration.from_pretrained(work / "model0")
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    questions = [{"images": [PILImage.open(work / row["image"])], "question": row["question"]} for row in rows]
    answers = answer(model, build_processor(), questions, batch_size=5, max_new_tokens=4)
    assert answers == [record["answer"] for record in records(finished / "answers.jsonl")]


def test_a_subset_is_marked(work, tmp_path, capsys):
    assert main(arguments(work, tmp_path / "out", "--limit", "4")) == 0
    text = "the first 4 of 18 rows"
    assert f"SUBSET: {text}" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["subset"] == text
    assert (
        text in (tmp_path / "out" / SAMPLES_FILE).read_text()
        and text in (tmp_path / "out" / "results.csv").read_text()
    )


def test_kinds_and_references_come_from_columns(work, tmp_path, capsys):
    """A kind for each question of a table; ten answers for VQA accuracy; one image has no blind control."""
    rows = {
        "table": {"image": "0.png", "questions": ["what is it", "is it red"], "answers": ["boat", "no"]},
        "ten": {"image": "0.png", "question": "what is it", "answer": "boat", "people": ["boat"] * 10, "id": 7},
    }
    for name, row in rows.items():
        (work / f"{name}.json").write_text(
            json.dumps([{**row, "kind": ["OPEN", "CLOSED"] if name == "table" else "x"}])
        )
    assert main(arguments(work, tmp_path / "table", data="table.json")) == 0
    lines = json.loads((tmp_path / "table" / "results.json").read_text())["kinds"]
    assert [(line["kind"], line["n"], line["blind"]) for line in lines] == [
        ("CLOSED", 1, None),
        ("OPEN", 1, None),
        ("all", 2, None),
    ]
    vqa = ["--scorer", "vqa", "--prompt", "vqav2", "--references", "people", "--id", "id", "--submission", "vqav2"]
    assert main(arguments(work, tmp_path / "ten", *vqa, data="ten.json")) == 0
    (record,) = records(tmp_path / "ten" / "answers.jsonl")
    assert record["truth"] == ["boat"] * 10 and record["id"] == 7
    assert record["question"] == "what is it\nAnswer the question using a single word or phrase."
    (entry,) = json.loads((tmp_path / "ten" / "submission.json").read_text())
    assert entry["question_id"] == 7
    capsys.readouterr()
    for options, message in {
        ("--scorer", "vqa"): "there are 1",
        ("--scorer", "BLEU"): "no scorer 'BLEU'",
        ("--references", "humans"): "No row has a column 'humans'",
        ("--prompt", "imagenet"): "no prompt 'imagenet'",
        ("--submission", "vizwiz"): "needs --id: the column image",
    }.items():
        assert main(arguments(work, tmp_path / "none", *options, data="ten.json")) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_a_server_gets_every_question_once():
    first, second = {"id": 1, "question": "what"}, {"id": 2, "question": "where"}
    check_submission([first, second], None)
    for questions, subset, said in [
        ([first, second], "the first 2 of 9 rows", "the whole set"),
        ([first, {**second, "id": None}], None, "question 1 ('where') has no id"),
        ([first, {**second, "id": 1}], None, "questions 0 and 1 have the same id 1"),
    ]:
        with pytest.raises(ValueError, match=re.escape(said)):
            check_submission(questions, subset)


def test_pope_reports_f1(work, tmp_path, capsys):
    """Its splits are the kinds. MME's rule fails before anything is answered: half of a pair has no score."""
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    rows = [{**row, "answer": ("yes", "no")[i % 2]} for i, row in enumerate(rows)]
    (work / "pope.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(arguments(work, tmp_path / "out", "--scorer", "pope", data="pope.jsonl")) == 0
    summary = json.loads((tmp_path / "out" / "results.json").read_text())["summary"]
    said = [
        (record["truth"], bool({"no", "No", "not"} & set(record["answer"].split(".")[0].replace(",", "").split(" "))))
        for record in records(tmp_path / "out" / "answers.jsonl")
        if record["kind"] == "kind 1"
    ]
    true_yes = sum(truth == "yes" and not denied for truth, denied in said)
    f1 = 2 * true_yes / (sum(not denied for _, denied in said) + sum(truth == "yes" for truth, _ in said))
    assert summary["kind 1"]["f1"] == pytest.approx(100 * f1) and summary["kind 1"]["n"] == 6
    assert main(arguments(work, tmp_path / "mme", "--scorer", "mme", data="pope.jsonl")) == 1
    assert "two questions about a image" in capsys.readouterr().err and not (tmp_path / "mme").exists()


def test_scores_of_several_references():
    question = {"answer": ["red", "blue"], "kind": "all"}
    assert score_answers([question], ["Blue"], "exact") == [1.0]
    assert by_kind([question, {"kind": "a"}]) == {"a": [1], "all": [0, 1]}


# ---- The blind control ----


def test_what_a_row_gives_goes_before_its_question(processor):
    def message(role, *texts):
        return {"role": role, "content": [{"type": "text" if text else "image", "text": text} for text in texts]}

    system, answer = message("system", "be short"), message("assistant", "red")
    messages = [system, message("user", None, "what color ?"), answer, message("user", "and", None, "that ?"), answer]
    row = {"messages": messages, "images": ["a", "b"]}
    first, second = split_questions([row])
    assert (first["question"], second["question"]) == ("what color ?", "<image> and <image> that ?")
    assert first["before"] == second["before"] == [message("system", "be short")]
    (given,) = split_questions([{**row, "num_context_messages": 4}])  # a prompt with an answer in it, and a completion
    assert [m["role"] for m in given["before"]] == ["system", "user", "assistant"]
    assert [m["role"] for m in conversation(given)] == ["system", "user", "assistant", "user"]
    rows = Dataset.from_list([{**row, "images": [], "num_context_messages": n} for n in (0, 4)])
    questions, _ = read_questions(rows.cast_column("images", List(ImageFeature())))
    assert [len(question["before"]) for question in questions] == [1, 1, 3]
    kinds = Dataset.from_list([{**row, "images": [], "kind": kind} for kind in ('"a"', None)])
    questions, _ = read_questions(kinds.cast_column("images", List(ImageFeature())), kind=None)
    assert {question["kind"] for question in questions} == {"all"}  # a column that nobody asked for
    (plain,) = split_questions([{"messages": messages[1:3], "images": ["a"]}])
    assert "before" not in plain

    [question] = split_questions([{**row, "messages": messages[1:], "num_context_messages": 3}])
    prompt = processor.apply_chat_template(conversation(question | {"images": [None, None]}), tokenize=False)
    assert prompt == "USER : <image>\nwhat color ? ASSISTANT : red</s> USER : and<image>\nthat ? ASSISTANT :"


def test_no_question_keeps_its_image():
    rng = random.Random(0)
    for trial in range(200):
        images = [f"image {i}" for i in range(rng.randint(2, 6))]
        most = rng.choices(images, weights=[50] + [1] * (len(images) - 1), k=12)  # nearly all about one
        questions = [{"images": [image]} for image in [*images, *most]]
        questions += [{"images": rng.sample(images, rng.randint(0, len(images) - 1))} for _ in range(5)]
        shuffled = with_shuffled_images(questions, seed=trial)
        for question, control in zip(questions, shuffled, strict=True):
            assert not set(question["images"]) & set(control["images"])
            assert len(question["images"]) == len(control["images"])


def test_a_image_of_a_phone_is_upright(tmp_path):
    """As in a row: its pixels lie on their side, and a tag says how to hold it."""
    image = PILImage.new("RGB", (8, 4), "red")
    image.paste("blue", (0, 0, 4, 4))
    exif = PILImage.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    image.save(tmp_path / "phone.png", exif=exif)
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "phone.png", "question": "what ?", "answer": "red"}]))
    (row,) = load_rows(str(tmp_path / "rows.json"))
    found = open_image(tmp_path / "phone.png")
    assert found.size == (4, 8) and found.tobytes() == row["images"][0].convert("RGB").tobytes()


def test_equal_images_are_one_image():
    """Two objects with the same pixels are not each other's control."""
    red, again, blue = (PILImage.new("RGB", (4, 4), color) for color in ("red", "red", "blue"))
    assert image_key(red) == image_key(again) != image_key(blue)
    shuffled = with_shuffled_images([{"images": [image]} for image in (red, again, blue)])
    assert [image_key(question["images"][0]) for question in shuffled[:2]] == [image_key(blue)] * 2
    assert image_key(shuffled[2]["images"][0]) == image_key(red)


# ---- Intervals and comparison ----


def test_the_interval_is_that_of_independent_images():
    generator = np.random.default_rng(0)
    scores = generator.random(400) < 0.7
    low, high = bootstrap_interval(scores, range(400))
    width = 2 * 1.96 * (scores.mean() * (1 - scores.mean()) / 400) ** 0.5
    assert high - low == pytest.approx(width, rel=0.1) and low < scores.mean() < high
    # ten questions each that say the same add nothing, though one by one they would
    many, images = np.repeat(scores, 10), np.repeat(np.arange(400), 10)
    assert np.subtract(*bootstrap_interval(many, images)) == pytest.approx(-width, rel=0.1)
    assert np.subtract(*bootstrap_interval(many, range(4000))) == pytest.approx(-width / 10**0.5, rel=0.1)
    assert bootstrap_interval([1.0] * 5, list("abcde")) == (1.0, 1.0)


def test_mcnemar():
    assert mcnemar([1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1, 1]) == (5, 1, 2 * (1 + 6) / 2**6)
    assert mcnemar([1, 0], [1, 0]) == (0, 0, 1.0)
    assert mcnemar([1] * 1500 + [0] * 1500, [0] * 1500 + [1] * 1500)[2] == 1.0  # 2^3000 is no double


def test_two_runs_are_compared_question_by_question(work, finished, tmp_path, capsys):
    other = tmp_path / "other"
    assert main(arguments(work, other, model="model1")) == 0
    # make the truths of the second run's answers to kind 0 right, in both runs
    for folder in (finished, other):
        copy = tmp_path / f"{folder.name} copy"
        copy.mkdir()
        (copy / "results.json").write_bytes((folder / "results.json").read_bytes())
        run = json.loads((folder / "run.json").read_text()) | {"subset": "the first 18 of 20 rows"}
        (copy / "run.json").write_text(json.dumps(run))
        changed = []
        for record, second in zip(records(folder / "answers.jsonl"), records(other / "answers.jsonl"), strict=True):
            truth = second["answer"] if record["kind"] == "kind 0" else "nobody says this"
            changed.append(json.dumps({**record, "truth": truth, "question": ""}) + "\n")  # a image alone
        (copy / "answers.jsonl").write_text("".join(changed))
    copies = [str(tmp_path / f"{folder.name} copy") for folder in (finished, other)]
    capsys.readouterr()
    assert main(["compare", *copies, "--output", str(tmp_path / "compared")]) == 0
    comparison = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    lines = {line["kind"]: line for line in comparison["kinds"]}
    agreeing = NUM_IMAGES - len(comparison["flips"])
    assert lines["kind 0"]["second"] == 1 and lines["kind 0"]["first"] == agreeing / NUM_IMAGES
    assert len(comparison["flips"]) == lines["all"]["second_better"] > 3 and lines["all"]["first_better"] == 0
    assert lines["kind 0"]["p"] == 2 / 2 ** len(comparison["flips"]) and lines["kind 1"]["p"] == 1
    assert lines["kind 1"]["difference"] == lines["kind 1"]["low"] == lines["kind 1"]["high"] == 0
    printed = capsys.readouterr().out
    assert "| kind 0 | 6 |" in printed and "SUBSET: the first 18 of 20 rows" in printed
    assert comparison["subset"] == "the first 18 of 20 rows"

    answers = tmp_path / "other copy" / "answers.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:-1]))
    assert main(["compare", *copies]) == 1
    assert "is not finished (17 of 18 answers)" in capsys.readouterr().err
    assert main(["compare", copies[0], str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a model"], "The questions are missing. Pass --dataset or --tasks"),
        (["no model", "--tasks", "mme", "--seed", "1"], "--seed has no effect with --tasks"),
        (
            ["no model", "--tasks", "mme", "--split", "x", "--scorer", "mme"],
            "--split, --scorer have no effect",
        ),
    ],
)
def test_arguments_without_effect_are_refused(capsys, arguments, said):
    assert main(["eval", *arguments]) == 1 and said in capsys.readouterr().err


def test_the_run_is_known_before_anything_is_written(work, tmp_path, capsys):
    """Answers without a `run.json` are nobody's."""
    os.mkdir(tmp_path / "out")
    (tmp_path / "out" / "answers.jsonl").write_text("")
    assert main(arguments(work, tmp_path / "out")) == 1
    assert "no run.json that says whose" in capsys.readouterr().err


def test_evaluate_returns_the_scores_of_the_run(work, finished, monkeypatch):
    """The tower encodes each image once for both runs, and the result is that of `vtlmm eval`."""
    model, processor = load_model(work / "model0")
    encoded, forward = [], model.model.vision_tower.forward

    def count(pixel_values, **kwargs):
        encoded.append(len(pixel_values))
        return forward(pixel_values, **kwargs)

    monkeypatch.setattr(model.model.vision_tower, "forward", count)
    result = evaluate(model, processor, work / "rows.jsonl", kind="kind", max_new_tokens=4)
    expected = {record["index"]: record["answer"] for record in records(finished / "answers.jsonl")}
    assert len(result.answers) == len(expected) == result.num_questions
    assert sum(encoded) == NUM_IMAGES and result.kinds[-1]["kind"] == "all" and "| all |" in result.format()


def test_evaluate_rejects_invalid_rows_before_the_first_answer(work, tmp_path):
    model, processor = load_model(work / "model0")
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"question": "what", "answer": "red"}, {"question": "what </s>", "answer": "red"}]))
    with pytest.raises(ValueError, match="row 1"):
        evaluate(model, processor, rows, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
