# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Randomly changed rows and images: check, training, evaluation and `ask` read the same, or raise one named error."""

import base64
import contextlib
import copy
import json
import random
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from helpers.tiny_models import TEMPLATE, build_config, build_processor
from PIL import Image

from vtlmm.data import sources
from vtlmm.data.arrow_rows import rows_table
from vtlmm.data.data_report import FIXES
from vtlmm.data.encoding import encode_messages
from vtlmm.data.formats import convert_row
from vtlmm.data.images import image_key, open_image
from vtlmm.data.questions import iterate_turns
from vtlmm.data.row_checker import RESULT_FEATURES, RowChecker, image_problems
from vtlmm.data.row_tables import RowColumns, llava_row
from vtlmm.data.rows import ROW_FEATURES, load_rows
from vtlmm.data.validation import check_rows
from vtlmm.evaluation import runner
from vtlmm.hub.chat_templates import add_images_and_marks, load_template
from vtlmm.inference import batch_file
from vtlmm.inference.generation import conversation
from vtlmm.inference.prompt_encoding import encode_prompt
from vtlmm.train.collator import VTLMMCollator
from vtlmm.train.dataset_config import DatasetConfig
from vtlmm.train.run_data import prepare_dataset


NUM_MUTATIONS = 200
MAX_LENGTH = 100  # in tokens, and the number of positions of the decoder
CHAT = [{"role": "user", "content": "<image> what ?"}, {"role": "assistant", "content": "a red square"}]
TURNS = [
    {"from": "human", "value": "<image>\nwhat is it ?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "and the color ?"},
    {"from": "gpt", "value": "blue"},
]
PARTS = [{"type": "image"}, {"type": "text", "text": "what ?"}]
BASES = [
    {"messages": CHAT, "images": ["good.png"]},
    {"conversations": TURNS, "image": "good.png", "id": 7},
    {"question": "what ?", "answer": "red", "image": "good.png"},
    {"questions": ["what ?", "which ?"], "answers": ["red", "blue"], "images": ["good.png", "photo.jpg"]},
    {"instruction": "say it", "input": "red", "output": "blue"},
    {"query": "<image> what <image> ?", "response": "yes", "images": ["good.png", "photo.jpg"]},
    {"prompt": "what ?", "completion": "red", "image": "photo.jpg"},
    {"prompt": [CHAT[0]], "completion": [CHAT[1]], "images": ["good.png"]},
    {"image": "photo.jpg", "caption": "a red square"},
    {"texts": [{"user": "what ?", "assistant": "red"}], "images": ["good.png"]},
    {"messages": [{"role": "user", "content": PARTS}, CHAT[1]], "image": "good.png", "system": "say yes"},
    {"question": "what ?", "answers": ["red", "red", "blue"], "image": "good.png"},
]
VALUES = [
    None, "", " ", 3, -1.5, float("nan"), True, False, [], {}, [[]], [None], {"a": 1}, ["red", 3], "red", "3", "null",
    "<image>", "<image> <image> what ?", "what <image>", "</s>", "<s> red", "USER : what ? ASSISTANT : red", "<unk>",
    "good.png", "photo.jpg", "\ud800", "\u202ered", "red\x00blue", "é ü 漢", "red " * 60, "{{ 1 }}", "[]", "[1, 2]",
    [{"role": "user", "content": "hi"}], {"bytes": None, "path": "good.png"}, "data:image/png;base64,AAAA",
    {"url": "good.png"}, [{"type": "image"}], [{"type": "text"}], [{"type": "video", "video": "a.mp4"}],
]  # fmt: skip
IMAGES = [
    "good.png", "photo.jpg", "missing.png", "cut.png", "text.png", "flipped.png", "deep.png", "strip.png",
    "palette.png", "cmyk.jpg", "rotated.jpg", "animated.gif", "../good.png", "./sub/../good.png", "/missing/a.png",
    "https://example.com/a.png", "file://good.png", "sub", "", ".", "GOOD.PNG", "data:image/png;base64,####",
    ["good.png", "good.png"], [["good.png"]], ["good.png", None], {"path": "good.png", "bytes": None}, 3, [], [3],
    "good\x00.png", "s3://bucket/a.png",
]  # fmt: skip
COLUMNS = [
    "tools", "system", "history", "images", "image", "photo", "text", "caption", "answer", "answers", "question",
    "messages", "num_context_messages", "id", "label", "choices", "videos", "completion", "input", "context",
]  # fmt: skip


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
    (folder / "sub").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels)
    photo.save(folder / "good.png")
    photo.save(folder / "photo.jpg")
    content = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("<html>404</html>")
    (folder / "flipped.png").write_bytes(content[:60] + bytes([content[60] ^ 255]) + content[61:])
    Image.fromarray(np.full((8, 8), 30000, dtype=np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (3000, 2), "red").save(folder / "strip.png")
    photo.quantize(8).save(folder / "palette.png", transparency=0)
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (32, 16), "blue").save(folder / "rotated.jpg", exif=exif)
    photo.save(folder / "animated.gif", save_all=True, append_images=[Image.new("RGB", (32, 32))])
    return folder


# ---- Mutations ----


def paths(value, path=()):
    """Yield the path of every value inside a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths(item, (*path, key))


def mutate(row, rng):
    """Return a copy of a row with one random change."""
    row = copy.deepcopy(row)
    kind = rng.choice(["value", "value", "image", "image", "column", "remove", "rename", "repeat", "base64"])
    path = rng.choice(list(paths(row)) or [("question",)])
    parent = row
    for key in path[:-1]:
        parent = parent[key]
    if kind == "value":
        parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    elif kind == "image":
        row["images" if "images" in row else "image"] = copy.deepcopy(rng.choice(IMAGES))
    elif kind == "base64":
        row.pop("images", None)
        row["image"] = base64.b64encode(rng.randbytes(40)).decode()
    elif kind == "column":
        row[rng.choice(COLUMNS)] = copy.deepcopy(rng.choice(VALUES))
    elif kind == "remove":
        del parent[path[-1]]
    elif kind == "rename":
        name = rng.choice(list(row) or ["a"])
        row[rng.choice(COLUMNS)] = row.pop(name, None)
    elif kind == "repeat" and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[path[-1]]))
    return row


def mutated_row(seed):
    rng = random.Random(seed)
    row = rng.choice(BASES)
    for _ in range(rng.choice([1, 1, 2, 3])):
        row = mutate(row, rng)
    return row


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


# ---- Shorter ways for usual rows ----


OPTIONS = {"columns": {}, "keep_columns": (), "require_answers": True}


def llava_rows():
    """Return mutated rows in LLaVA's format; many of them are still valid."""
    turns = [TURNS, TURNS[:2], [{"from": "system", "value": "say yes"}, *TURNS]]
    for seed in range(600):
        rng = random.Random(seed)
        row = {"id": rng.choice([seed, f"{seed}", "a.png"]), "image": "good.png", "conversations": rng.choice(turns)}
        for _ in range(rng.choice([0, 1, 1, 2])):
            row = mutate(row, rng)
        yield row


def converted(convert, row):
    try:
        return convert(row)
    except ValueError as error:
        return str(error)


def in_columns(row, folder):
    columns = RowColumns(ROW_FEATURES, "rows", str(folder), OPTIONS)
    columns.add(row, 0)
    return columns.table().to_pylist()


def test_usual_rows_are_converted_like_all_rows(folder):
    def one_by_one(row):
        return rows_table(convert_row(row, 0, "rows", str(folder)), ROW_FEATURES).to_pylist()

    rows = list(llava_rows())
    for row in rows:
        assert converted(lambda row: in_columns(row, folder), row) == converted(one_by_one, row), row
    assert 100 < sum(llava_row(row) is not None for row in rows) < 500


@pytest.mark.parametrize("template", ["tests", "vicuna_v1", "mistral", "decoder"])
def test_tables_have_the_results_of_rows(folder, template):
    processor = build_processor()
    if template == "decoder":
        text = "{% for m in messages %}{{ '[' + m.role + '] ' + m.content | trim + eos_token }}{% endfor %}"
        processor.chat_template = add_images_and_marks(text, processor.tokenizer)
    elif template != "tests":
        processor.chat_template = load_template(template)
    results = [converted(lambda row: in_columns(row, folder), row) for row in llava_rows()]
    table = rows_table([row for result in results if isinstance(result, list) for row in result], ROW_FEATURES)
    checker = RowChecker(processor, MAX_LENGTH)
    expected = checker.check(table.to_pylist())
    assert checker.check_table(table).to_pylist() == rows_table(expected, RESULT_FEATURES).to_pylist()
    assert checker.check_table(table[7:50]).to_pylist() == rows_table(expected[7:50], RESULT_FEATURES).to_pylist()
    plain = checker._check_plain(table)
    assert 100 < len(plain) < len(table) and (checker.texts.num_failures > 0) == (template == "decoder")
