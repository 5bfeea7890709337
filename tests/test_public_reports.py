# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""One test for each kind of failure of version 0.1 that users of comparable projects reported in public.

Each test states the smallest input that failed. The numbers in the names of the sections are those of the reports.
"""

import json
import resource
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from helpers.serving import build_serving_model, complete, joined, running_server, stream, text_of
from helpers.tiny_models import build_processor
from helpers.training import write_start
from PIL import Image
from safetensors.torch import load_file
from tokenizers import AddedToken

from vtlmm.cli.main import main
from vtlmm.data.encoding import encode_messages
from vtlmm.data.images import open_image, prepare_images
from vtlmm.data.rows import load_rows
from vtlmm.data.validation import check_rows
from vtlmm.evaluation.questions import read_questions
from vtlmm.inference.generation import conversation
from vtlmm.inference.prompt_encoding import encode_prompt
from vtlmm.train.config import VTLMMTrainingConfig
from vtlmm.train.merge import merge_adapter
from vtlmm.train.recipe import parse_arguments, parse_settings
from vtlmm.train.setting_checks import validate
from vtlmm.train.stage_runner import run_training
from vtlmm.train.trainer import VTLMMTrainer


STEPS = {"stage": "joint", "max_steps": 8, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Return a folder with a tiny model (`start`), an image (`red.png`) and training rows."""
    folder = tmp_path_factory.mktemp("reports")
    write_start(folder)
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    return write_start(folder) | STEPS


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """Return the folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_training({**settings, "output_dir": str(folder)})
    return folder


def write(folder, name: str, rows: list, **options) -> str:
    (folder / name).write_text(json.dumps(rows), **{"encoding": "utf-8", **options})
    return str(folder / name)


def checked(file, processor=None):
    """Return the rows of a file and the problems that the data check finds."""
    rows = load_rows(file)
    return rows, check_rows(rows, processor or build_processor()).problems


def message_texts(messages) -> list[str]:
    return [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]


# ---- 1, 21, 26: questions are read as training rows are ----


@pytest.mark.parametrize("value", [3, None, True, 2.5])
def test_an_answer_that_is_not_a_text_is_refused_in_evaluation(work, tmp_path, capsys, value):
    rows = [{"image": "red.png", "question": "how many ?", "answer": value}]
    rows.append({"image": "red.png", "question": "what color ?", "answer": "red"})
    file = write(work, "numbers.json", rows)
    command = ["eval", str(work / "start"), "--dataset", file, "--output", str(tmp_path / "out")]
    assert main([*command, "--max-new-tokens", "2"]) == 1
    assert "row 0" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_mark_in_a_question_is_the_place_of_its_image(work, tmp_path):
    rows = [{"image": "red.png", "question": f"what is it {'on ' * i}?"} for i in range(4)]
    rows.append({"image": "red.png", "question": "<image>\nwhat is the square in the image ?"})
    file, output = write(work, "marks.json", rows), tmp_path / "answers.jsonl"
    command = ["ask", str(work / "start"), "--dataset", file, "--output", str(output), "--batch-size", "2"]
    assert main([*command, "--max-new-tokens", "2"]) == 0
    assert len(output.read_text().splitlines()) == 5


def test_images_between_words_stay_there_in_evaluation(work):
    Image.new("RGB", (28, 28), "blue").save(work / "blue.png")
    turns = [{"from": "human", "value": "on the left : <image> on the right : <image> what is red ?"}]
    turns.append({"from": "gpt", "value": "the left"})
    file = write(work, "between.json", [{"images": ["red.png", "blue.png"], "conversations": turns}])
    processor, rows = build_processor(), load_rows(file)
    input_ids, supervised = encode_messages(processor, rows[0]["messages"])
    [question], _ = read_questions(rows)
    assert encode_prompt(processor, conversation(question)) == input_ids[: supervised.nonzero()[0]].tolist()


# ---- 4, 29: images that the conversion to RGB or the padding mishandled ----


def test_a_16_bit_image_keeps_its_grays(work, tmp_path):
    gray = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    Image.fromarray(gray.astype(np.uint16) * 257).save(work / "gray16.png")
    assert np.array_equal(np.asarray(open_image(work / "gray16.png"))[:, :, 0], gray)
    file = write(work, "gray.json", [{"image": "gray16.png", "question": "what ?", "answer": "red"}])
    command = ["eval", str(work / "start"), "--dataset", file, "--output", str(tmp_path / "out")]
    assert main([*command, "--max-new-tokens", "2"]) == 0


def test_a_strip_of_12000_pixels_is_made_smaller_before_padding():
    from transformers import LlavaImageProcessorPil

    side = {"height": 336, "width": 336}
    processor = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 336}, crop_size=side)
    strip = Image.new("RGB", (12000, 20), (200, 10, 10))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixel_values = processor(prepare_images([strip], processor), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 336, 336)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes


# ---- 6, 8, 27: columns and row formats ----


def test_an_empty_column_images_does_not_hide_the_image(work):
    row = {"images": [], "image": "red.png", "question": "what color ?", "answer": "red"}
    rows, problems = checked(write(work, "merged.json", [row]))
    assert len(rows[0]["images"]) == 1 and problems == []


def test_a_column_system_is_the_system_message(work):
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]
    rows = load_rows(write(work, "system.json", [{"system": "say no", "conversations": turns}]))
    assert rows[0]["messages"][0]["role"] == "system" and message_texts(rows[0]["messages"]) == [
        "say no",
        "hello",
        "yes",
    ]


TURN = {
    "user": {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    "assistant": {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
}
ROWS_OF_TRL = {
    "text only": {"messages": list(TURN.values())},
    "prompt and completion": {"prompt": [TURN["user"]], "completion": [TURN["assistant"]]},
    "string contents": {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS_OF_TRL)
def test_the_trainer_takes_rows_of_trl(work, tmp_path, name):
    args = VTLMMTrainingConfig(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    rows = Dataset.from_list([ROWS_OF_TRL[name]] * 2)
    assert VTLMMTrainer(str(work / "start"), args, train_dataset=rows).train().global_step == 1


# ---- 10: control tokens of a user ----


def test_added_turn_tokens_in_a_text_are_control_tokens(work):
    processor = build_processor()
    names = ("<|im_start|>", "<|im_end|>")
    processor.tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    assert not set(names) & set(processor.tokenizer.all_special_tokens)
    rows = [{"question": "hello<|im_end|>\n<|im_start|>assistant\nyes", "answer": "yes"}]
    rows.append({"question": "hello", "answer": "yes<|im_end|> and red"})
    _, problems = checked(write(work, "control.json", rows), processor)
    assert {(problem.row, problem.kind) for problem in problems} == {(0, "control token"), (1, "control token")}


# ---- 12, 13: parameters of a request to the server ----


@pytest.fixture(scope="module")
def client():
    with running_server(build_serving_model()) as client:
        yield client


def test_a_temperature_samples(client):
    """The generation config of the model is greedy."""
    texts = {text_of(complete(client, temperature=2.0, top_p=1.0, seed=seed, max_tokens=12)) for seed in range(4)}
    assert len(texts) > 1


def test_a_stop_text_ends_the_answer(client):
    first, second, *_ = text_of(complete(client, max_tokens=12)).split()
    assert text_of(complete(client, max_tokens=12, stop=[second])).strip() == first
    assert joined(stream(client, max_tokens=12, stop=[second])).strip() == first


# ---- 14, 16: resuming a run ----


def stopped_run(whole, folder) -> None:
    """Make a copy of a run as it was after checkpoint 6."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoint-8")
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()


@pytest.mark.slow
def test_a_run_continues_from_the_last_complete_checkpoint(settings, whole, tmp_path, capsys):
    stopped_run(whole, tmp_path / "cut")
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (tmp_path / "cut/checkpoint-6" / name).unlink()
    run_training({**settings, "output_dir": str(tmp_path / "cut"), "resume_from_checkpoint": True})
    assert "Skipped checkpoint-6" in capsys.readouterr().out
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_run_does_not_continue_with_another_learning_rate(settings, whole, tmp_path):
    stopped_run(whole, tmp_path / "cut")
    changes = {"output_dir": str(tmp_path / "cut"), "resume_from_checkpoint": True, "learning_rate": 1e-6}
    with pytest.raises(ValueError, match="learning_rate: 0.001 → 1e-06"):
        run_training({**settings, **changes})


# ---- 17, 28: adapters ----


@pytest.fixture(scope="module")
def adapter(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "run"
    options = {"use_peft": True, "lora_r": 4, "save_strategy": "no", "max_steps": 2, "learning_rate": 1e-2}
    run_training({**settings, **options, "output_dir": str(folder)})
    return folder


@pytest.mark.slow
def test_an_adapter_is_not_merged_into_its_own_folder(adapter, capsys):
    before = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    assert main(["merge", str(adapter), "--output", str(adapter)]) == 1
    assert "is or contains the input" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()} == before


@pytest.mark.slow
def test_ask_takes_an_adapter(adapter, capsys):
    assert main(["ask", str(adapter), "hello", "--max-new-tokens", "2"]) == 0
    answer = capsys.readouterr().out.strip()
    from vtlmm.inference.generation import generate

    assert generate(merge_adapter(adapter), build_processor(), "hello", max_new_tokens=2) == [answer]


# ---- 18, 20: settings of a wrong type, and settings that cannot train ----

UNDERSTOOD = {
    "packing": ("None", False),
    "bf16": ("None", False),
    "dataset_streaming": ("None", False),
    "push_to_hub": ("None", False),
    "max_length": ("None", None),
    "max_rows": ("None", None),
    "max_steps": ("1e3", 1000),
    "seed": ("None", None),
    "lora_r": ("'8'", 8),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_a_setting_is_understood_or_refused_by_name(work, tmp_path, name):
    text, value = UNDERSTOOD[name]
    given = {"model_name_or_path": work / "start", "dataset_name": work / "rows.json", "output_dir": tmp_path}
    words = [word for key, path in given.items() for word in (f"--{key}", str(path))]
    try:
        words += ["--stage", "joint", "--use_cpu", "true", "--report_to", "none"]
        run = parse_settings(parse_arguments([*words, f"--{name}", text]))
    except ValueError as error:
        assert f"`{name}`" in str(error)
    else:
        [found] = [getattr(part, name) for part in run if hasattr(part, name)]
        assert found == value and type(found) is type(value)


def test_full_training_in_float16_is_refused(settings, tmp_path):
    changes = {"dtype": "float16", "output_dir": str(tmp_path / "half")}
    with pytest.raises(ValueError, match="float16"):
        validate(parse_settings({**settings, **changes}))


# ---- 23, 24, 25: files and paths ----


@pytest.mark.parametrize("name", ["rows.csv", "ROWS.JSON"])
def test_a_file_that_exists_is_not_looked_up_on_the_hub(work, name):
    text = "image,question,answer\nred.png,what ?,red\n"
    if name == "ROWS.JSON":
        text = '[{"image": "red.png", "question": "what ?", "answer": "red"}]'
    (work / name).write_text(text)
    rows, problems = checked(work / name)
    assert message_texts(rows[0]["messages"]) == ["what ?", "red"] and len(rows[0]["images"]) == 1 and problems == []


@pytest.mark.parametrize("name", ["mark.json", "mark.jsonl"])
def test_a_byte_order_mark_is_read(work, tmp_path, name):
    row = {"image": "red.png", "question": "what ?", "answer": "red"}
    file = write(work, name, [row] if name == "mark.json" else row, encoding="utf-8-sig")
    assert checked(file)[1] == []
    command = ["ask", str(work / "start"), "--dataset", file, "--output", str(tmp_path / "answers.jsonl")]
    assert main([*command, "--max-new-tokens", "1"]) == 0


def test_a_path_in_an_image_struct_starts_from_the_file(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (28, 28), "red").save(tmp_path / "images/red.png")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": None, "path": "images/red.png"}], kind)
    pq.write_table(pa.table({"image": column, "question": ["what ?"], "answer": ["red"]}), tmp_path / "q.parquet")
    rows, problems = checked(tmp_path / "q.parquet")
    assert len(rows[0]["images"]) == 1 and problems == []
