# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Every supported dataset format, as published, loads with its image. The docs table of formats is made from this."""

import base64
import csv
import io
import json
import tarfile

import datasets
import PIL.Image
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from helpers.tiny_models import build_processor

from vtlmm.data.formats import CAPTION_QUESTION
from vtlmm.data.rows import load_rows
from vtlmm.data.sources import require_source
from vtlmm.data.validation import check_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(color="red", size=(8, 6)) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


BASE64 = base64.b64encode(png()).decode()
URI = f"data:image/png;base64,{BASE64}"
ASKED = ["user: ■|What is it?", "assistant: a cat"]
CAPTION = [f"user: ■|{CAPTION_QUESTION}", "assistant: a cat"]
CHAT = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a cat"}]


def short(row):
    """`role: text` of each message, an image as ■, parts joined by |."""
    return [
        f"{m['role']}: {'|'.join('■' if p['type'] == 'image' else str(p['text']) for p in m['content'])}"
        for m in row["messages"]
    ]


def parts(*image_parts):
    text = {"type": "text", "text": "What is it?"}
    return {"messages": [{"role": "user", "content": [*image_parts, text]}, CHAT[1]]}


# Rows that are lines of JSON or rows of a table: name, row, messages. The image is 1.png next to the file, or inside.
ROWS = {
    "LLaVA": (
        {
            "id": "1",
            "image": "1.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat"}],
        },
        ASKED,
    ),
    "ShareGPT, LLaMA-Factory": (
        {
            "conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "a cat"}],
            "system": "Be short.",
            "tools": "",
            "images": ["1.png"],
        },
        ["system: Be short.", *ASKED],
    ),
    "TRL messages": ({"messages": CHAT, "images": ["1.png"]}, ASKED),
    "TRL prompt and completion": ({"prompt": CHAT[:1], "completion": CHAT[1:], "images": ["1.png"]}, ASKED),
    "FineVision, the_cauldron": (
        {"images": ["1.png"], "texts": [{"user": "What is it?", "assistant": "a cat", "source": "VQAv2"}]},
        ASKED,
    ),
    "OpenAI image_url": (parts({"type": "image_url", "image_url": {"url": URI, "detail": "low"}}), ASKED),
    "Qwen image part": (parts({"type": "image", "image": "1.png", "max_pixels": 50176}), ASKED),
    "Qwen part without type": (
        {"messages": [{"role": "user", "content": [{"image": "1.png"}, {"text": "What is it?"}]}, CHAT[1]]},
        ASKED,
    ),
    "transformers path part": (parts({"type": "image", "path": "1.png"}), ASKED),
    "ms-swift query": (
        {
            "system": "Be short.",
            "query": "<image>What is it?",
            "response": "a cat",
            "history": [["hi", "hello"]],
            "images": ["1.png"],
        },
        ["system: Be short.", "user: hi", "assistant: hello", *ASKED],
    ),
    "ms-swift conversation": (
        {"conversation": [{"human": "What is it?", "assistant": "a cat"}], "images": ["1.png"]},
        ASKED,
    ),
    "Alpaca": ({"instruction": "What is", "input": "it?", "output": "a cat"}, ["user: What is\nit?", ASKED[1]]),
    "Alpaca with text": (
        {"instruction": "hi", "input": "", "output": "yo", "text": "### Instruction:\nhi\n### Response:\nyo"},
        ["user: hi", "assistant: yo"],
    ),
    "Alpaca with image": ({"instruction": "What is it?", "output": "a cat", "images": ["1.png"]}, ASKED),
    "base64 image": ({"image": BASE64, "question": "What is it?", "answer": "a cat"}, ASKED),
    "base64 data URI": ({"image": URI, "question": "What is it?", "answer": "a cat"}, ASKED),
    "VQAv2 on the Hub": (
        {
            "question_id": 1,
            "image": "1.png",
            "question": "What is it?",
            "multiple_choice_answer": "a cat",
            "answers": [{"answer": "a dog", "answer_confidence": "yes", "answer_id": 1}],
        },
        ASKED,
    ),
    "TextVQA, OK-VQA on the Hub": (
        {
            "image": "1.png",
            "question": "What is it?",
            "answers": ["a dog", "a cat", "a cat"],
            "flickr_original_url": "https://example.com/1.jpg",
        },
        ASKED,
    ),
    "ChartQA on the Hub": ({"image": "1.png", "query": "What is it?", "label": ["a cat"]}, ASKED),
    "questions and answers": (
        {"image": "1.png", "questions": ["What is it?", "Sure?"], "answers": ["a cat", "yes"]},
        [*ASKED, "user: Sure?", "assistant: yes"],
    ),
    "caption": ({"image": "1.png", "caption": "a cat"}, CAPTION),
    "empty images next to an image": (
        {"images": [], "image": "1.png", "question": "What is it?", "answer": "a cat"},
        ASKED,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_row_formats(tmp_path, name):
    (tmp_path / "1.png").write_bytes(png())
    row, messages = ROWS[name]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    [loaded] = load_rows(tmp_path / "rows.jsonl")
    assert short(loaded) == messages
    assert [image.size for image in loaded["images"]] == [(8, 6)] * str(messages).count("■")
    [loaded] = load_rows([row], image_folder=tmp_path)
    assert short(loaded) == messages


# ---- Files and folders ----


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def coco_captions(folder):
    (folder / "val2017").mkdir()
    (folder / "val2017" / "000000000009.jpg").write_bytes(png())
    images = [{"id": 9, "file_name": "000000000009.jpg", "height": 6, "width": 8, "coco_url": "http://x/9.jpg"}]
    annotations = [{"image_id": 9, "id": i, "caption": text} for i, text in enumerate(["a cat", "an animal"])]
    path = write_json(folder / "captions_val2017.json", {"info": {}, "images": images, "annotations": annotations})
    return path, {"image_folder": folder / "val2017"}, [CAPTION, [CAPTION[0], "assistant: an animal"]]


def vqa_pair(folder):
    (folder / "COCO_val2014_000000000042.jpg").write_bytes(png())
    questions = [{"image_id": 42, "question": "What is it?", "question_id": 42000}]
    annotation = {
        "image_id": 42,
        "question_id": 42000,
        "multiple_choice_answer": "a cat",
        "answers": [{"answer": "x"}],
    }
    content = {"data_type": "mscoco", "data_subtype": "val2014", "annotations": [annotation]}
    write_json(folder / "v2_mscoco_val2014_annotations.json", content)
    content = {"data_type": "mscoco", "data_subtype": "val2014", "questions": questions}
    return write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", content), {}, [ASKED]


def visual_genome(folder):
    (folder / "VG_100K_2").mkdir()
    (folder / "VG_100K_2" / "7.jpg").write_bytes(png())
    qa = {"qa_id": 1, "image_id": 7, "question": "What is it?", "answer": "a cat", "q_objects": [], "a_objects": []}
    return write_json(folder / "question_answers.json", [{"id": 7, "qas": [qa]}]), {}, [ASKED]


def text_vqa(folder):
    (folder / "train_images").mkdir()
    (folder / "train_images" / "ab.jpg").write_bytes(png())
    row = {"question": "What is it?", "image_id": "ab", "answers": ["a cat"] * 10, "flickr_300k_url": "http://x/a.jpg"}
    return write_json(folder / "TextVQA_0.5.1_train.json", {"dataset_name": "textvqa", "data": [row]}), {}, [ASKED]


def flickr_token(folder):
    (folder / "10.jpg").write_bytes(png())
    (folder / "results.token").write_text("10.jpg#0\ta cat\n10.jpg#1\tan animal\n")
    return folder / "results.token", {}, [CAPTION, [CAPTION[0], "assistant: an animal"]]


def flickr_hub(folder):
    row = {"image": {"bytes": png(), "path": "10.jpg"}, "caption": ["a cat", "an animal"], "filename": "10.jpg"}
    features = Features({"image": Image(), "caption": List(Value("string")), "filename": Value("string")})
    Dataset.from_list([row], features=features).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet", {}, [CAPTION, [CAPTION[0], "assistant: an animal"]]


def karpathy(folder):
    (folder / "10.jpg").write_bytes(png())
    image = {"filename": "10.jpg", "sentences": [{"raw": "a cat", "tokens": ["a", "cat"]}], "split": "train"}
    return write_json(folder / "dataset_flickr30k.json", {"images": [image], "dataset": "flickr30k"}), {}, [CAPTION]


def web_dataset(folder):
    conversation = {"id": 1, "image": "x/1.jpg", "conversations": ROWS["LLaVA"][0]["conversations"]}
    samples = [("000.jpg", png()), ("000.txt", b"a cat"), ("001.jpg", png())]
    samples.append(("001.json", json.dumps(conversation).encode()))
    with tarfile.open(folder / "shard-000.tar", "w") as archive:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder, {}, [CAPTION, ASKED]


def image_folder(folder):
    (folder / "train").mkdir()
    (folder / "train" / "1.png").write_bytes(png())
    (folder / "train" / "metadata.csv").write_text("file_name,text\n1.png,a cat\n")
    return folder, {}, [CAPTION]


def image_text_pairs(folder):
    (folder / "1.png").write_bytes(png())
    (folder / "1.txt").write_text("a cat\n")
    return folder, {}, [CAPTION]


def saved_dataset(folder):
    rows = Dataset.from_list([{"image": {"bytes": png(), "path": None}, "caption": "a cat"}])
    DatasetDict({"train": rows.cast_column("image", Image())}).save_to_disk(folder / "saved")
    return folder / "saved", {}, [CAPTION]


def csv_file(folder):
    (folder / "1.png").write_bytes(png())
    with open(folder / "ROWS.CSV", "w", newline="") as file:
        csv.writer(file).writerows([["image", "question", "answer"], ["1.png", "What is it?", "a cat"]])
    return folder / "ROWS.CSV", {}, [ASKED]


def tsv_file(folder):
    (folder / "rows.tsv").write_text(f"index\timage\tquestion\tanswer\n0\t{BASE64}\tWhat is it?\ta cat\n")
    return folder / "rows.tsv", {}, [ASKED]


def mapped_columns(folder):
    (folder / "1.png").write_bytes(png())
    path = write_json(folder / "rows.json", [{"photo": "1.png", "ask": "What is it?", "reply": "a cat"}])
    return path, {"columns": {"image": "photo", "question": "ask", "answer": "reply"}}, [ASKED]


def image_struct_with_relative_path(folder):
    (folder / "images").mkdir()
    (folder / "images" / "1.png").write_bytes(png())
    row = {"image": {"bytes": None, "path": "images/1.png"}, "question": "What is it?", "answer": "a cat"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "rows.parquet")
    return folder / "rows.parquet", {}, [ASKED]


SOURCES = [
    coco_captions,
    vqa_pair,
    visual_genome,
    text_vqa,
    flickr_token,
    flickr_hub,
    karpathy,
    web_dataset,
    image_folder,
    image_text_pairs,
    saved_dataset,
    csv_file,
    tsv_file,
    mapped_columns,
    image_struct_with_relative_path,
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_files_and_folders(tmp_path, make, streaming):
    folder = tmp_path / "data"
    folder.mkdir()
    dataset, options, expected = make(folder)
    rows = list(load_rows(dataset, streaming=streaming, **options))
    assert [short(row) for row in rows] == expected
    assert all(row["images"][0].size == (8, 6) for row in rows)


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["rows.json", "rows.JSONL", "rows.jsonl.gz", "rows.csv", "rows.json.bz2"])
def test_encodings_and_compressions(tmp_path, encoding, name):
    import bz2
    import gzip

    row = {"question": "Où ?", "answer": "là"}
    text = "question,answer\nOù ?,là\n" if "csv" in name else json.dumps(row, ensure_ascii=False)
    text = f"[{text}]" if ".json" in name and ".jsonl" not in name.lower() else text
    content = text.encode(encoding)
    content = gzip.compress(content) if name.endswith(".gz") else content
    (tmp_path / name).write_bytes(bz2.compress(content) if name.endswith(".bz2") else content)
    [loaded] = load_rows(tmp_path / name)
    assert short(loaded) == ["user: Où ?", "assistant: là"]


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "rows.csv").write_bytes("question,answer\nOù ?,là\n".encode("cp1252"))
    with pytest.raises(ValueError, match="rows.csv is not UTF-8 .byte 0xf9.. Save the file as UTF-8"):
        load_rows(tmp_path / "rows.csv")


def test_json_lines_in_a_json_file(tmp_path):
    (tmp_path / "rows.json").write_text('{"question": "a?", "answer": "b"}\n{"question": "c?", "answer": "d"}\n')
    assert len(load_rows(tmp_path / "rows.json")) == 2


def test_local_paths_are_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("vtlmm.data.sources.load_dataset", lambda *_, **__: pytest.fail("looked up"))
    for name in ("rows.json", "data/rows.CSV", "/data/rows", "./rows", "~/rows", "a/b/c", f"{tmp_path}/rows"):
        with pytest.raises(FileNotFoundError, match="does not exist") as error:
            load_rows(name)
        assert "\n" not in str(error.value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(FileNotFoundError):  # `data/` is a local folder
        load_rows("data/rows")
    (tmp_path / "rows.txt").write_text("x")
    with pytest.raises(ValueError, match="rows.txt: files of this type are not supported.*JSON"):
        load_rows("rows.txt")
    assert require_source("data") and not require_source("org/name") and not require_source("squad")


def test_base64_is_not_in_errors(tmp_path):
    """Also base64 of a format that is not recognized, and with an invalid character."""
    unknown = base64.b64encode(bytes(range(256)) * 40).decode()
    file = io.BytesIO()
    PIL.Image.effect_noise((32, 32), 50).save(file, "PNG")
    png_text = base64.b64encode(file.getvalue()).decode()
    row = {"question": "what", "answer": "red"}
    for image in (unknown, unknown[:-5] + "####", f"{png_text[:-8]}####", f"data:image/png;base64,{unknown[:-5]}#"):
        (tmp_path / "rows.json").write_text(json.dumps([{**row, "image": image}]))
        with pytest.raises(ValueError) as error:
            check_rows(load_rows(tmp_path / "rows.json"), build_processor()).raise_for_problems()
        assert "row 0" in str(error.value) and unknown[20:60] not in str(error.value)
        assert png_text[20:60] not in str(error.value) and len(str(error.value)) < 600
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "image": "long/" * 200 + "a.png"}]))
    report = check_rows(load_rows(tmp_path / "rows.json"), build_processor())
    assert len(str(report.problems[0])) < 400


def test_missing_image_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="image_folder '/no/such' is not an existing folder"):
        load_rows(write_json(tmp_path / "rows.json", [{"question": "a?", "answer": "b"}]), image_folder="/no/such")


def test_questions_without_answers(tmp_path):
    (tmp_path / "1.png").write_bytes(png())
    rows = [{"image": "1.png", "question": "<image>\nWhat is it?"}, {"prompt": "hi"}, ROWS["LLaVA"][0]]
    path = write_json(tmp_path / "rows.json", rows)
    loaded = load_rows(path, require_answers=False)
    assert [short(row) for row in loaded] == [ASKED[:1], ["user: hi"], ASKED]
    with pytest.raises(ValueError, match="row 0 has columns"):
        load_rows(path)


def test_loading_loaded_rows_again(tmp_path):
    row = {"messages": CHAT, "num_context_messages": 2}
    [loaded] = load_rows(load_rows([row]))
    assert loaded["num_context_messages"] == 2 and short(loaded) == ["user: What is it?", "assistant: a cat"]
