# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Randomly changed rows and images: check, training, evaluation and `ask` read the same, or raise one named error."""

import contextlib
import json
from types import SimpleNamespace

import datasets
import pytest
from helpers.mutations import MAX_LENGTH, mutated_row, write_images
from helpers.tiny_models import TEMPLATE, build_config, build_processor

from vtlmm.data import sources
from vtlmm.data.data_report import FIXES
from vtlmm.data.encoding import encode_messages
from vtlmm.data.formats import convert_row
from vtlmm.data.images import image_key, open_image
from vtlmm.data.questions import iterate_turns
from vtlmm.data.row_checker import RowChecker, image_problems
from vtlmm.data.rows import ROW_FEATURES, load_rows
from vtlmm.data.validation import check_rows
from vtlmm.evaluation import runner
from vtlmm.inference import batch_file
from vtlmm.inference.generation import conversation
from vtlmm.inference.prompt_encoding import encode_prompt
from vtlmm.train.collator import VTLMMCollator
from vtlmm.train.dataset_config import DatasetConfig
from vtlmm.train.run_data import prepare_dataset


NUM_MUTATIONS = 200


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def processor():
    processor = build_processor()
    system = "{% elif message['role'] == 'system' %}{{ message['content'][0]['text'] + ' ' }}"
    processor.chat_template = TEMPLATE.replace("{% else %}", system + "{% else %}")
    return processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


# ---- Readers: each returns the prompts of a row, or the text of its error ----


def asked_prompt(processor, question, load_image):
    """Return the token ids of a question's prompt, and the hashes of its images."""
    input_ids = encode_prompt(processor, conversation(question))
    return input_ids, [image_key(load_image(image)) for image in question["images"]]


def trained_prompts(processor, rows):
    prompts = []
    for row in rows:
        VTLMMCollator(processor, MAX_LENGTH)([row])
        for turn in iterate_turns(row["messages"], row["num_context_messages"]):
            messages = [*turn.before, turn.user, turn.answer]
            input_ids, supervised = encode_messages(processor, messages, len(turn.before))
            images = [image_key(open_image(image)) for image in row["images"][: turn.num_images]]
            prompts.append((input_ids[: supervised.nonzero()[0]].tolist(), images))
    return prompts


def read_for_check(file, processor, monkeypatch):
    rows = load_rows(file)
    check_rows(rows, processor, MAX_LENGTH).raise_for_problems()
    return trained_prompts(processor, rows)


def read_for_training(file, processor, monkeypatch, streaming=False):
    rows = prepare_dataset(DatasetConfig(file, dataset_streaming=streaming), "train", processor, MAX_LENGTH)
    return trained_prompts(processor, rows)


def read_as_stream(file, processor, monkeypatch):
    return read_for_training(file, processor, monkeypatch, streaming=True)


def read_for_evaluation(file, processor, monkeypatch):
    read = {}

    def run_questions(model, processor, rows, questions, image_positions, *args):
        load_image = runner.image_loader(rows, image_positions)
        read["prompts"] = [asked_prompt(processor, question, load_image) for question in questions]
        raise InterruptedError

    monkeypatch.setattr(runner, "run_questions", run_questions)
    monkeypatch.setattr(runner, "run_key", lambda *args: {})
    with pytest.raises(InterruptedError):
        runner.evaluate(model_with_positions(MAX_LENGTH), processor, file)
    return read["prompts"]


def read_for_ask(file, processor, monkeypatch):
    read = {}

    def answer_all(output, model, processor, questions, load_image, *args):
        read["prompts"] = [asked_prompt(processor, question, load_image) for question in questions]
        raise InterruptedError

    monkeypatch.setattr(batch_file, "answer_all", answer_all)
    monkeypatch.setattr(batch_file, "run_key", lambda *args, **options: {})
    monkeypatch.setattr(batch_file, "open_run", lambda *args: None)
    with pytest.raises(InterruptedError):
        batch_file.answer_file(model_with_positions(MAX_LENGTH), processor, file, f"{file}.answers.jsonl")
    return read["prompts"]


def model_with_positions(number):
    config = build_config()
    config.text_config.max_position_embeddings = number
    return SimpleNamespace(name_or_path="model", config=config)


READERS = {
    "check": read_for_check,
    "train": read_for_training,
    "stream": read_as_stream,
    "eval": read_for_evaluation,
    "ask": read_for_ask,
}


def unanswered_prompts(file, processor):
    """Return the prompts of rows that end with a question, which only `ask` accepts."""
    rows = load_rows(file, require_answers=False)
    prompts = []
    for row in rows:
        assert row["messages"][-1]["role"] == "user"
        images = [image_key(open_image(image)) for image in row["images"]]
        prompts.append((encode_prompt(processor, row["messages"]), images))
    return prompts


def outcome(read, file, processor, monkeypatch):
    try:
        return read(file, processor, monkeypatch)
    except (ValueError, FileNotFoundError) as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_all_readers_agree_on_mutated_rows(folder, processor, monkeypatch, part, tmp_path):
    kinds = set()
    for seed in range(part, NUM_MUTATIONS, 4):
        row, file = mutated_row(seed), str(folder / f"{seed}.json")
        with open(file, "w", encoding="utf-8") as output:
            json.dump([row], output)
        read = {name: outcome(reader, file, processor, monkeypatch) for name, reader in READERS.items()}
        text = f"seed {seed}: {row}\n{read}"
        expected = read["check"]
        for name, result in read.items():
            if isinstance(result, str):
                assert file in result or "row 0" in result, text
                kinds |= {kind for kind in FIXES if kind in result}
            if name == "ask" and isinstance(expected, str) and not isinstance(result, str):
                assert result == unanswered_prompts(file, processor), text
                continue
            assert isinstance(result, str) == isinstance(expected, str), f"{name}: {text}"
            if not isinstance(result, str) and not isinstance(expected, str):
                assert result == expected, f"{name}: {text}"
    assert len(kinds) > 3


# ---- Many rows at once ----


def rows_that_convert(folder):
    rows = []
    for seed in range(600):
        row = mutated_row(seed)
        with contextlib.suppress(ValueError):
            rows.append((row, convert_row(row, 0, "rows", str(folder))))
    return rows


def problems_one_by_one(checker, row):
    """Return the problems of a row, its number of tokens and of supervised tokens, from one row at a time."""
    problems = list(checker.message_problems(row["messages"], len(row["images"])))
    length = num_supervised = 0
    if not problems:
        try:
            input_ids, supervised = encode_messages(
                checker.processor, row["messages"], row["num_context_messages"] or 0
            )
        except ValueError as error:
            problems.append(("chat template", str(error)))
        else:
            length = len(input_ids) + 3 * len(row["images"])  # 4 patches
            num_supervised = int(supervised.sum())
            problems += [(p["kind"], p["detail"]) for p in checker.encoding_problems(length, num_supervised, 1)]
    problems += [(kind, detail) for image in row["images"] for kind, detail, _ in image_problems(image)]
    return problems, length, num_supervised


def test_batches_find_what_single_rows_have(folder, processor):
    rows = [new for _, converted in rows_that_convert(folder) for new in converted]
    dataset = datasets.Dataset.from_list(rows, features=ROW_FEATURES)
    rows = list(dataset.cast_column("images", datasets.List(datasets.Image(decode=False))))
    checker = RowChecker(processor, MAX_LENGTH)
    expected = [problems_one_by_one(checker, row) for row in rows]
    report = check_rows(dataset, processor, MAX_LENGTH, num_proc=1)
    found = [[(p.kind, p.detail) for p in report.problems if p.row == i] for i in range(len(rows))]
    without_counts = [[(k, "" if k == "too long" else d) for k, d in problems] for problems, _, _ in expected]
    assert [[(k, "" if k == "too long" else d) for k, d in problems] for problems in found] == without_counts
    assert report.lengths == [length for _, length, _ in expected]
    assert report.num_supervised_tokens == sum(number for _, _, number in expected) > 0
    answers = [
        "".join(part["text"] for part in message["content"] if part["type"] == "text" and part["text"])
        for row in rows
        for message in row["messages"]
        if message["role"] == "assistant"
    ]
    unknown = [text for text in answers if 0 in processor.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert report.num_answers == len(answers) and report.num_unknown_answers == len(unknown) > 0
    assert report.unknown_answer == unknown[0]
    assert len({problem.kind for problem in report.problems}) > 8
    in_stream = check_rows(dataset.to_iterable_dataset(), processor, MAX_LENGTH)
    assert in_stream == report


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_arrow_files_have_the_rows_of_datasets(folder, tmp_path, monkeypatch, suffix):
    """The cache is written from whole columns. `datasets` encodes each value."""
    monkeypatch.setattr(sources, "CHUNK_SIZE", 50)  # rows continue in the next part of the file
    pairs = rows_that_convert(folder)
    file = tmp_path / f"rows.{suffix}"
    rows = [json.dumps(row) for row, _ in pairs]
    file.write_text("\n".join(rows) if suffix == "jsonl" else f" [ {' , '.join(rows)}\n] \n")
    expected = datasets.Dataset.from_list([new for _, converted in pairs for new in converted], features=ROW_FEATURES)
    found = load_rows(str(file), image_folder=str(folder))
    assert found.data.table.to_pylist() == expected.data.table.to_pylist() and len(found) > 100
