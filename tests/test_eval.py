# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm eval` and `evaluate`: answers that do not depend on batches or interruptions, reports, and invalid input."""

import csv
import fcntl
import json
import os
import re
import shutil
import signal
import time
from functools import partial

import datasets
import pytest
from helpers.evaluation import (  # noqa: F401 - fixtures
    NUM_IMAGES,
    QUESTIONS_PER_IMAGE,
    arguments,
    finished,
    read_files,
    records,
    save_model,
    work,
)
from helpers.forked import fork, wait, wait_until
from helpers.tiny_models import build_processor
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.cli.main import main
from vtlmm.evaluation.report import SAMPLES_FILE, by_kind
from vtlmm.evaluation.runner import LOCK_FILE, SHUFFLED_FILE
from vtlmm.evaluation.samples_page import NUM_SAMPLES, SHUFFLED_COLUMNS, samples_page
from vtlmm.evaluation.scorers import accuracy_by_kind
from vtlmm.inference import resumable
from vtlmm.inference.generation import answer


# ---- Answers ----


def test_batch_size_does_not_change_answers(work, finished, tmp_path):
    assert main(arguments(work, tmp_path / "out", "--batch-size", "1")) == 0
    for name in ("answers.jsonl", SHUFFLED_FILE):
        for found, expected in zip(records(tmp_path / "out" / name), records(finished / name), strict=True):
            assert found == expected | {"probability": pytest.approx(expected["probability"], abs=2e-4)}
    assert (tmp_path / "out" / "results.csv").read_bytes() == (finished / "results.csv").read_bytes()
    assert len({record["answer"] for record in records(finished / "answers.jsonl")}) > 5


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_files(work, finished, tmp_path, monkeypatch):
    """SIGKILL between two batches, then as if it had come while a line was written."""
    generate_batch = resumable.generate_batch

    def slow_batch(*args, **kwargs):
        time.sleep(0.1)
        return generate_batch(*args, **kwargs)

    answers, log = tmp_path / "out" / "answers.jsonl", tmp_path / "log.txt"
    with monkeypatch.context() as patch:
        patch.setattr(resumable, "generate_batch", slow_batch)
        process = fork(partial(main, arguments(work, tmp_path / "out", "--batch-size", "1")), log)
    try:
        wait_until(lambda: answers.is_file() and answers.read_bytes().count(b"\n") >= 2, log)
    finally:
        os.kill(process, signal.SIGKILL)  # also after a failed assertion: nothing may wait for this process
    assert wait(process) == -signal.SIGKILL
    done = answers.read_bytes()
    assert done.count(b"\n") < NUM_IMAGES * QUESTIONS_PER_IMAGE and not (tmp_path / "out" / "results.json").exists()
    answers.write_bytes(done + b'{"index": 1, "ans')
    assert main(arguments(work, tmp_path / "out", "--batch-size", "4")) == 0
    assert read_files(tmp_path / "out") == read_files(finished)


def test_finished_run_is_not_answered_again(work, finished, monkeypatch):
    before = read_files(finished)
    monkeypatch.setattr("vtlmm.inference.resumable.generate_batch", None)
    assert main(arguments(work, finished)) == 0
    assert read_files(finished) == before


def test_different_runs_are_never_mixed(work, finished, tmp_path, capsys):
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


def test_second_writer_is_refused(work, tmp_path, capsys):
    lock = tmp_path / "out" / LOCK_FILE
    lock.parent.mkdir()
    lock.write_text("process 7 on host")
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(arguments(work, tmp_path / "out")) == 1
    assert f"Another process is writing to {tmp_path / 'out'} (process 7 on host)" in capsys.readouterr().err
    assert not (tmp_path / "out" / "run.json").exists()


def test_answers_without_a_run_file_are_refused(work, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "answers.jsonl").write_text("")
    assert main(arguments(work, tmp_path / "out")) == 1
    assert "answers.jsonl exists, but run.json" in capsys.readouterr().err


def test_missing_tensor_is_refused(work, tmp_path, capsys):
    save_model(tmp_path / "model", 0)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj" in name and "language_model" in name)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    assert main(arguments(work, tmp_path / "out", model=tmp_path / "model")) == 1
    assert f"has 1 missing tensors of VTLMMForConditionalGeneration, e.g. {name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- Reports ----


def test_report_agrees_with_the_answers(work, finished):
    """Compare the scores with a second computation, and the table in its three files."""
    results = json.loads((finished / "results.json").read_text())
    right, shuffled = records(finished / "answers.jsonl"), records(finished / SHUFFLED_FILE)
    questions = [{"kind": record["kind"], "answer": record["truth"]} for record in right]
    accuracy = accuracy_by_kind(questions, [record["answer"] for record in right])
    control = accuracy_by_kind(questions, [record["answer"] for record in shuffled])
    for line in results["kinds"]:
        assert (line["score"], line["n"]) == accuracy[line["kind"]]
        assert line["score_shuffled_images"] == control[line["kind"]][0]
        assert line["low"] <= line["score"] <= line["high"] and line["low"] < line["high"]
        assert line["images"] == NUM_IMAGES
    assert [line["kind"] for line in results["kinds"]] == ["kind 0", "kind 1", "kind 2", "all"]
    with open(finished / "results.csv", newline="") as file:
        assert [line["score"] for line in csv.DictReader(file)] == [str(line["score"]) for line in results["kinds"]]
    assert all(a["images"] != b["images"] for a, b in zip(right, shuffled, strict=True))
    page = (finished / SAMPLES_FILE).read_text()
    assert page.count('src="data:image/jpeg;base64,') == len(right) == page.count("<dt>Ground truth</dt>")
    assert "All 18 questions." in page and page.count("<option>kind ") == 3
    assert "http" not in page and results["subset"] is None
    bins = results["calibration"]["bins"]
    assert sum(bin["n"] for bin in bins) == 18 and page.count('<g class="bin">') == len(bins)
    mean = sum(bin["n"] * bin["probability"] for bin in bins) / 18
    assert mean == pytest.approx(sum(record["probability"] for record in right) / 18)
    assert (results["num_rows"], results["num_questions"], results["skipped"]) == (18, 18, [])


def test_answers_of_an_earlier_version_have_no_calibration(work, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    lines = (json.loads(line) for line in (finished / "answers.jsonl").read_text().splitlines())
    without = [json.dumps({key: value for key, value in line.items() if key != "probability"}) for line in lines]
    (tmp_path / "out" / "answers.jsonl").write_text("\n".join(without) + "\n")
    assert main(arguments(work, tmp_path / "out")) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["calibration"] is None
    assert "Calibration" not in (tmp_path / "out" / SAMPLES_FILE).read_text()


def test_answers_become_a_dataset_with_images(work, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, out = tmp_path / "answers", shutil.copytree(finished, tmp_path / "out")
    assert main(arguments(work, out, "--answers-dataset", str(folder))) == 0
    assert f"hf upload USER/NAME {folder} --repo-type dataset" in capsys.readouterr().out
    rows = datasets.load_dataset(str(folder), split="test")
    assert (
        rows.features["image"] == datasets.Image() and "written by `vtlmm eval`" in (folder / "README.md").read_text()
    )
    shuffled = records(finished / SHUFFLED_FILE)
    given = map(json.loads, (work / "rows.jsonl").read_text().splitlines())
    for row, record, other, source in zip(rows, records(finished / "answers.jsonl"), shuffled, given, strict=True):
        assert (row["question"], row["ground_truth"]) == (record["question"], [record["truth"]])
        assert (row["answer"], row["answer_with_shuffled_image"]) == (record["answer"], other["answer"])
        assert (row["kind"], row["row"], row["probability"]) == (record["kind"], record["row"], record["probability"])
        assert row["image"].tobytes() == PILImage.open(work / source["image"]).tobytes()
    score = json.loads((out / "results.json").read_text())["kinds"][-1]["score"]
    assert sum(rows["score"]) / len(rows) == pytest.approx(score)
    assert main(arguments(work, out, "--answers-dataset", str(folder))) == 1
    assert "is not empty" in capsys.readouterr().err


def test_answers_equal_those_of_the_function(work, finished):
    model = VTLMMForConditionalGeneration.from_pretrained(work / "model0")
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    questions = [{"images": [PILImage.open(work / row["image"])], "question": row["question"]} for row in rows]
    answers = answer(model, build_processor(), questions, batch_size=5, max_new_tokens=4)
    assert answers == [record["answer"] for record in records(finished / "answers.jsonl")]


def test_subset_is_marked(work, tmp_path, capsys):
    assert main(arguments(work, tmp_path / "out", "--limit", "4")) == 0
    text = "the first 4 of 18 rows"
    assert f"SUBSET: {text}" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["subset"] == text
    assert all(text in (tmp_path / "out" / name).read_text() for name in (SAMPLES_FILE, "results.csv"))


def test_samples_link_to_their_rows_on_the_hub():
    """A random part of many questions, a fractional score, text that looks like HTML, and shuffled images."""
    questions = [{"question": f"<b>{i}</b>", "answer": "a", "images": [], "kind": "all", "row": i} for i in range(50)]
    line = {"kind": "all", "n": 50, "score": 0.5, "low": 0.4, "high": 0.6}
    results = {"data": "user/set", "split": "test", "kinds": [line | dict.fromkeys(SHUFFLED_COLUMNS)]}
    page = samples_page(questions, ["no"] * 50, ["with another"] * 50, [0.5] * 50, results, None)
    links = re.findall(r'href="https://huggingface.co/datasets/user/set/viewer/default/test\?row=(\d+)"', page)
    assert len(links) == NUM_SAMPLES and f"{NUM_SAMPLES} of 50 questions, chosen at random" in page
    assert all(f"<dd>&lt;b&gt;{row}&lt;/b&gt;</dd>" in page for row in links) and "<dd><b>" not in page
    assert page.count("right (0.50)") == page.count("with another</dd>") == NUM_SAMPLES
    assert '<td><b>50.0%</b> <span class="interval">40.0% – 60.0%</span></td>' in page
    local = samples_page(questions, ["no"] * 50, None, [0.0] * 50, results | {"data": "rows.jsonl"}, None)
    assert "huggingface.co" not in local and all(f'href="#question-{row}"' in local for row in links)


def test_kinds_that_look_like_formulas_are_harmless(work, tmp_path):
    row = {"image": "0.png", "question": "what", "answer": "red", "kind": "=HYPERLINK(1)"}
    (work / "formula.json").write_text(json.dumps([row]))
    assert main(arguments(work, tmp_path / "out", data="formula.json")) == 0
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        assert next(csv.DictReader(file))["kind"] == "'=HYPERLINK(1)"


def test_each_question_of_a_row_has_its_kind(work, tmp_path):
    """With one image there is no other image to show."""
    row = {"image": "0.png", "questions": ["what is it", "is it red"], "answers": ["boat", "no"]}
    (work / "table.json").write_text(json.dumps([{**row, "kind": ["OPEN", "CLOSED"]}]))
    assert main(arguments(work, tmp_path / "table", data="table.json")) == 0
    lines = json.loads((tmp_path / "table" / "results.json").read_text())["kinds"]
    found = [(line["kind"], line["n"], line["score_shuffled_images"]) for line in lines]
    assert found == [("CLOSED", 1, None), ("OPEN", 1, None), ("all", 2, None)]
    assert by_kind([{"kind": "all"}, {"kind": "a"}]) == {"a": [1], "all": [0, 1]}


def test_references_prompts_and_submissions(work, tmp_path, capsys):
    row = {"image": "0.png", "question": "what is it", "answer": "boat", "people": ["boat"] * 10, "id": 7, "kind": "x"}
    (work / "ten.json").write_text(json.dumps([row]))
    vqa = ["--scorer", "vqa", "--prompt", "vqav2", "--references", "people", "--id", "id", "--submission", "vqav2"]
    assert main(arguments(work, tmp_path / "ten", *vqa, data="ten.json")) == 0
    (record,) = records(tmp_path / "ten" / "answers.jsonl")
    assert record["truth"] == ["boat"] * 10 and record["id"] == 7
    assert record["question"] == "what is it\nAnswer the question using a single word or phrase."
    (entry,) = json.loads((tmp_path / "ten" / "submission.json").read_text())
    assert entry["question_id"] == 7
    capsys.readouterr()
    for options, message in {
        ("--scorer", "vqa"): "but there are 1",
        ("--scorer", "BLEU"): "Unknown scorer 'BLEU'",
        ("--references", "humans"): "No row has a column 'humans'",
        ("--prompt", "imagenet"): "Unknown prompt 'imagenet'",
        ("--submission", "vizwiz"): "needs the ids: set `row_id` (--id), e.g. to image",
    }.items():
        assert main(arguments(work, tmp_path / "none", *options, data="ten.json")) == 1
        assert message in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_pope_reports_f1(work, tmp_path, capsys):
    """Kinds are POPE's splits. MME fails before the first answer, because an image needs two questions."""
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
    assert "two questions for each image" in capsys.readouterr().err and not (tmp_path / "mme").exists()
