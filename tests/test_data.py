# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Rows of all formats load in order in one format, and no image is decoded during loading."""

import json
import os

import datasets
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value

from vtlmm.data.formats import CAPTION_QUESTION
from vtlmm.data.rows import ROW_FEATURES, load_rows
from vtlmm.train.dataset_config import DatasetConfig


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make_image(path, color="red"):
    path.parent.mkdir(exist_ok=True)
    PIL.Image.new("RGB", (8, 6), color).save(path)
    return path


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def short(row):
    """`role: text` of each message, an image as ■, parts joined by |."""
    return [
        f"{m['role']}: {'|'.join('■' if p['type'] == 'image' else p['text'] for p in m['content'])}"
        for m in row["messages"]
    ]


def answered(question, answer="yes"):
    return [f"user: {question}", f"assistant: {answer}"]


def llava(question, **row):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}], **row}


TURNS = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "yes"}]
# form: row, messages, number of images, number of context messages
FORMS = {
    "llava, mark first": (llava("<image>\nwhat ?", image="a.png"), answered("■|what ?"), 1, 0),
    "llava, mark last": (llava("what ?\n<image>", image="a.png"), answered("what ?|■"), 1, 0),
    "llava, marks inside": (
        llava("left <image> right <image> same ?", image=["a.png", "b.png"]),
        answered("left|■|right|■|same ?"),
        2,
        0,
    ),
    "llava, no mark": (llava("what ?", image="a.png"), answered("■|what ?"), 1, 0),
    "llava, no image": (llava("what ?"), answered("what ?"), 0, 0),
    "llava, system": (
        {"conversations": [{"from": "system", "value": "be good"}, *llava("hi")["conversations"]], "image": "a.png"},
        ["system: be good", *answered("■|hi")],
        1,
        0,
    ),
    "messages": ({"messages": TURNS, "images": ["a.png", "b.png"]}, answered("■|■|what ?"), 2, 0),
    "messages with parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "what ?"}, {"type": "image"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "yes", "image": None}]},
            ],
            "image": "a.png",
        },
        answered("what ?|■"),
        1,
        0,
    ),
    "prompt and completion": (
        {"prompt": "what ?", "completion": "yes", "images": ["a.png"]},
        answered("■|what ?"),
        1,
        1,
    ),
    "prompt and completion messages": (
        {"prompt": [*TURNS, TURNS[0]], "completion": [TURNS[1]], "images": []},
        answered("what ?") * 2,
        0,
        3,
    ),
    "questions": (
        {"questions": ["what ?", "who ?"], "answers": ["yes", "no"], "image": "a.png"},
        answered("■|what ?") + answered("who ?", "no"),
        1,
        0,
    ),
    "question": ({"question": "what ?", "answer": "yes", "image": "a.png"}, answered("■|what ?"), 1, 0),
    "caption": ({"caption": "a cat", "image": "a.png"}, answered(f"■|{CAPTION_QUESTION}", "a cat"), 1, 0),
    "text": ({"text": "a cat", "image": "a.png"}, answered(f"■|{CAPTION_QUESTION}", "a cat"), 1, 0),
}


@pytest.mark.parametrize("streaming", [False, True])
def test_every_form_in_one_file(tmp_path, streaming):
    for name in "ab":
        make_image(tmp_path / f"{name}.png")
    path = write(tmp_path / "rows.jsonl", [form[0] for form in FORMS.values()])
    rows = load_rows(path, streaming=streaming)
    held_out = DatasetConfig(path, dataset_test_split="train", dataset_streaming=streaming).load("eval")
    assert len(held_out) == len(list(rows))  # never a stream
    assert rows.features == ROW_FEATURES
    for row, (name, (_, messages, num_images, num_context)) in zip(rows, FORMS.items(), strict=True):
        assert short(row) == messages, name
        assert row["num_context_messages"] == num_context, name
        assert [image.size for image in row["images"]] == [(8, 6)] * num_images, name
        parts = [part for message in row["messages"] for part in message["content"]]
        assert all((part["text"] is None) == (part["type"] == "image") for part in parts), name


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("typed", [False, True])
def test_parquet(tmp_path, streaming, typed):
    """Images as an Image column, and as a struct without the metadata of `datasets`."""
    content = make_image(tmp_path / "a.png").read_bytes()
    features = {"questions": List(Value("string")), "answers": List(Value("string")), "id": Value("string")}
    features["image"] = Image() if typed else {"bytes": Value("binary"), "path": Value("string")}
    rows = [
        {
            "questions": [f"q{i}", "who ?"],
            "answers": ["yes", "no"],
            "id": "x",
            "image": {"bytes": content, "path": "x"},
        }
        for i in range(5)
    ]
    path = str(tmp_path / "rows.parquet")
    Dataset.from_list(rows, features=Features(features)).to_parquet(path)
    loaded = load_rows(path, streaming=streaming, max_rows=4)
    assert loaded.column_names == list(ROW_FEATURES)
    assert [short(row) for row in loaded] == [answered(f"■|q{i}") + answered("who ?", "no") for i in range(4)]
    assert next(iter(loaded))["images"][0].size == (8, 6)


@pytest.mark.parametrize("streaming", [False, True])
def test_one_question_per_row(tmp_path, streaming):
    """Each question keeps the images, the system message and the context. Invalid rows stay for the check."""
    make_image(tmp_path / "a.png")
    system = [{"role": "system", "content": "be good"}]
    rows = [
        {"questions": ["what ?", "who ?"], "answers": ["yes", "no"], "image": "a.png"},
        {"messages": [*system, *TURNS, *TURNS], "images": ["a.png"]},
        {"prompt": [*TURNS, TURNS[0]], "completion": [TURNS[1]]},
        {"messages": [TURNS[0]], "images": ["a.png"]},
        {"questions": ["here <image> and <image> what ?"], "answers": ["yes"], "image": ["a.png", "a.png"]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    loaded = load_rows(tmp_path / "rows.json", one_question_per_row=True, streaming=streaming)
    found = [(short(row), len(row["images"]), row["num_context_messages"]) for row in loaded]
    asked = answered("■|what ?")
    assert found == [
        (asked, 1, 0),
        (answered("■|who ?", "no"), 1, 0),
        *[(["system: be good", *asked], 1, 0)] * 2,
        (answered("what ?") * 2, 0, 3),
        (asked[:1], 1, 0),
        (answered("here|■|and|■|what ?"), 2, 0),
    ]
    assert next(iter(loaded))["images"][0].size == (8, 6)


@pytest.mark.parametrize("streaming", [False, True])
def test_list_of_images_in_a_table(tmp_path, streaming):
    content = make_image(tmp_path / "a.png").read_bytes()
    features = Features({"images": List(Image()), "prompt": Value("string"), "completion": Value("string")})
    rows = [{"images": [{"bytes": content}] * n, "prompt": "what ?", "completion": "yes"} for n in (2, 0)]
    path = str(tmp_path / "rows.parquet")
    Dataset.from_list(rows, features=features).to_parquet(path)
    loaded = list(load_rows(path, streaming=streaming))
    assert [len(row["images"]) for row in loaded] == [2, 0]
    assert [short(row) for row in loaded] == [answered("■|■|what ?"), answered("what ?")]


def test_folder_of_images_with_captions(tmp_path):
    folder = tmp_path / "images"
    make_image(folder / "a.png")
    write(folder / "metadata.jsonl", [{"file_name": "a.png", "text": "a cat"}])
    [row] = load_rows(str(folder))
    assert short(row) == answered(f"■|{CAPTION_QUESTION}", "a cat")
    assert row["images"][0].size == (8, 6)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_other_columns_are_kept_on_request(tmp_path, form, streaming):
    """Columns are kept as JSON texts, because their types may differ between rows."""
    kinds = ["yes/no", "other"] if form == "parquet" else [["yes/no", 2], None]
    rows = [{"question": "what ?", "answer": "yes", "kind": kind} for kind in kinds]
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        write(path, rows)
    assert set(next(iter(load_rows(path, streaming=streaming)))) == set(ROW_FEATURES)
    found = list(load_rows(path, streaming=streaming, keep_columns=("kind", "gone")))
    assert [json.loads(row["kind"]) for row in found] == kinds and [row["gone"] for row in found] == ["null"] * 2
    assert [short(row) for row in found] == [answered("what ?")] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_no_image_is_decoded_while_loading(tmp_path, monkeypatch, streaming):
    (tmp_path / "a.png").write_bytes(b"no image")
    features = Features({"image": Image(), "caption": Value("string")})
    table = str(tmp_path / "rows.parquet")
    content = {"bytes": b"no image", "path": None}
    Dataset.from_list([{"image": content, "caption": "a"}], features=features).to_parquet(table)
    monkeypatch.setattr(PIL.Image, "open", lambda *_, **__: pytest.fail("decoded"))
    for path in (write(tmp_path / "rows.jsonl", [{"image": "a.png", "caption": "a"}]), table):
        rows = load_rows(path, streaming=streaming)
        rows = rows.decode(False) if streaming else rows.cast_column("images", List(Image(decode=False)))
        [row] = rows
        assert set(row["images"][0]) == {"bytes", "path"}


def test_splits_slices_and_max_rows(tmp_path):
    rows = [llava(f"q{i}") for i in range(10)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    config = DatasetConfig(str(path), dataset_train_split="train[:60%]", dataset_test_split="train[-3:]", max_rows=5)

    def questions(split, config=config):
        return [short(row)[0] for row in config.load(split)]

    assert questions("train") == [f"user: q{i}" for i in range(5)]
    assert questions("eval") == [f"user: q{i}" for i in (7, 8, 9)]
    other = write(tmp_path / "other.jsonl", [llava("other")])
    assert questions("eval", DatasetConfig(str(path), eval_dataset=other)) == ["user: other"]
    assert DatasetConfig(str(path)).load("eval") is None
    assert len(load_rows(other, max_rows=5)) == 1


def test_configurations(tmp_path):
    """The configuration of the training data is used for evaluation if the datasets are the same."""
    tables = {}
    for name in ("train", "other"):  # folders with a configuration each
        folder = tmp_path / name
        folder.mkdir()
        Dataset.from_list([{"question": name, "answer": "a"}]).to_parquet(folder / "rows.parquet")
        header = f"---\nconfigs:\n- config_name: {name}_config\n  data_files: rows.parquet\n---\n"
        (folder / "README.md").write_text(header)
        tables[name] = str(folder)

    def question(config, split="train"):
        [row] = config.load(split)
        return short(row)[0]

    both = DatasetConfig(tables["train"], "train_config", eval_dataset=tables["other"], eval_config="other_config")
    assert question(both) == "user: train" and question(both, "eval") == "user: other"
    same = DatasetConfig(tables["train"], "train_config", eval_dataset=tables["train"])
    assert question(same, "eval") == "user: train"
    with pytest.raises(ValueError, match="other_config"):  # of no such configuration, where one is named
        DatasetConfig(tables["train"], "train_config", dataset_test_split="train", eval_config="other_config").load(
            "eval"
        )


def test_an_edited_file_is_read_again(tmp_path):
    for seconds, question in enumerate(["first", "other"]):
        path = write(tmp_path / "rows.jsonl", [llava(question)])
        os.utime(path, (seconds, seconds))
        assert short(load_rows(path)[0])[0] == f"user: {question}"


def test_paths_of_images(tmp_path):
    """Paths start from `image_folder`, else from the file. A path that leaves the folder keeps its `..`."""
    path = write(tmp_path / "rows.jsonl", [llava("q", image=i) for i in ("x/./a.png", "../a.png", "/a/../b.png")])
    (tmp_path / "other").mkdir()
    for folder in (None, str(tmp_path / "other")):
        rows = load_rows(path, image_folder=folder)
        rows = rows.cast_column("images", List(Image(decode=False)))
        base = folder or str(tmp_path)
        assert [row["images"][0]["path"] for row in rows] == [f"{base}/x/a.png", f"{base}/../a.png", "/b.png"]


def test_invalid_values_stay_for_the_check(tmp_path):
    turns = [{"from": "human", "value": 3}, {"from": "bot", "value": "\ud800"}, "x"]
    rows = [{"conversations": turns}, {"messages": []}, {"questions": ["a", "b"], "answers": ["c"]}]
    first, second, third = load_rows(write(tmp_path / "rows.jsonl", rows))
    assert [message["role"] for message in first["messages"]] == ["user", "bot", None]
    assert [message["content"][0]["text"] for message in first["messages"]] == [None, None, None]
    assert second["messages"] == []
    assert third["messages"][3]["content"] == [{"type": "text", "text": None}]


@pytest.mark.parametrize("streaming", [False, True])
def test_errors_name_file_and_row(tmp_path, streaming):
    def load(path):
        return list(load_rows(path, streaming=streaming))

    with pytest.raises(ValueError, match=r"rows.jsonl, row 1 has columns \['foo', 'image'\].*`conversations`"):
        load(write(tmp_path / "rows.jsonl", [llava("q"), {"foo": 1, "image": "a.png"}]))
    table = str(tmp_path / "rows.parquet")
    Dataset.from_list([{"foo": 1}]).to_parquet(table)
    with pytest.raises(ValueError, match=r"rows.parquet, row 0 has columns \['foo'\]"):
        load(table)
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(llava('q'))}\n\n{{oops\n")
    with pytest.raises(ValueError, match="bad.jsonl, line 3 is not JSON"):
        load(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="bad.json must hold a list"):
        load(str(tmp_path / "bad.json"))
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        load(str(tmp_path / "nothing.json"))


def test_invalid_column_mappings(tmp_path):
    path = write(tmp_path / "rows.jsonl", [llava("q")])
    for columns in ("image", {"image": 3}, {"question": ["a", "b"]}):
        with pytest.raises(ValueError, match="`columns`"):
            load_rows(path, columns=columns)
    with pytest.raises(ValueError, match=r"has no column \['reply'\], which `columns` names"):
        load_rows(Dataset.from_list([llava("q")]), columns={"answer": "reply"})


def test_stream_in_worker_processes(tmp_path):
    """Order is kept with one worker, and a shuffled stream has decoded images too."""
    make_image(tmp_path / "a.png")
    path = write(tmp_path / "rows.jsonl", [llava(f"q{i}", image="a.png") for i in range(6)])
    stream = load_rows(path, streaming=True)
    loader = torch.utils.data.DataLoader(stream, batch_size=2, num_workers=1, collate_fn=list)
    rows = [row for batch in loader for row in batch]
    assert [short(row)[0] for row in rows] == [f"user: ■|q{i}" for i in range(6)]
    assert all(row["images"][0].size == (8, 6) for row in stream.shuffle(buffer_size=4))


def test_shared_llava_sample(shared):
    folder = shared / "data" / "llava_pretrain_2k"
    records = json.loads((folder / "chat.json").read_text(encoding="utf-8"))
    rows = load_rows(folder / "chat.json", image_folder=folder / "images")
    assert len(rows) == len(records) == 2183
    for row, record in zip(rows.select_columns("messages"), records, strict=True):
        question, answer = (turn["value"] for turn in record["conversations"])
        parts = row["messages"][0]["content"]
        # the template writes the mark on a separate line
        assert "\n".join("<image>" if p["type"] == "image" else p["text"] for p in parts) == question
        assert row["messages"][1]["content"][0]["text"] == answer
    assert rows[0]["images"][0].size == (336, 224)


def test_shared_easy_vqa(shared):
    rows = load_rows(str(shared / "data/easy_vqa/test.parquet"), max_rows=3)
    assert short(rows[0])[:3] == [
        "user: ■|what is the red shape?",
        "assistant: triangle",
        "user: what is the color of the triangle?",
    ]
    assert [image.size for row in rows for image in row["images"]] == [(64, 64)] * 3
