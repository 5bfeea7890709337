# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm data convert`: the written dataset has the same rows and image bytes, and `datasets` decodes its images."""

import io
import json

import datasets
import pytest
from PIL import Image

from vtlmm.cli.main import main
from vtlmm.data import dataset_files
from vtlmm.data.dataset_files import write_dataset
from vtlmm.data.rows import load_rows, undecoded_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def file(tmp_path):
    """Rows with one image as PNG or JPEG, without an image, and with context messages."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (9, 5), "red").save(folder / "a.png")
    Image.new("RGB", (9, 5), "blue").save(folder / "b.jpg")
    rows = [
        {"image": "images/a.png", "question": "what <image> ?", "answer": "a Ü"},
        {"image": "images/b.jpg", "prompt": "say", "completion": "yes"},
        {"question": "who ?", "answer": "no one"},
    ] * 40
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "rows.jsonl"


def contents(rows):
    """Return the columns of each row, images as bytes."""
    found = []
    for row in undecoded_images(rows):
        images = [image["bytes"] or open(image["path"], "rb").read() for image in row["images"]]
        found.append((row["messages"], row["num_context_messages"], images))
    return found


@pytest.mark.parametrize("to", ["parquet", "webdataset"])
def test_the_written_rows_are_the_same(file, tmp_path, monkeypatch, to):
    monkeypatch.setattr(dataset_files, "MAX_FILE_BYTES", 10_000)  # several files
    assert main(["data", "convert", str(file), "--to", to, "--output", str(tmp_path / "out")]) == 0
    written = tmp_path / "out"
    assert contents(load_rows(written)) == contents(load_rows(file))
    assert len(list(written.glob("train-*"))) > 1
    assert main(["data", "convert", str(file), "--to", to, "--output", str(written)]) == 1  # not overwritten
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in written.iterdir())


def test_datasets_reads_an_image_column(file, tmp_path):
    folder = write_dataset(load_rows(file), tmp_path / "one", split="test")
    rows = datasets.load_dataset(str(folder), split="test")
    assert rows.features["image"] == datasets.Image()
    assert rows[0]["image"].getpixel((0, 0)) == (255, 0, 0) and rows[2]["image"] is None
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3)).save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": None}
    several = load_rows([{"images": [image, image], "question": "what ?", "answer": "a"}])
    for to in ("parquet", "webdataset"):
        folder = write_dataset(several, tmp_path / f"two_{to}", to)
        assert [i.size for i in load_rows(folder)[0]["images"]] == [(3, 3)] * 2
    features = datasets.load_dataset(str(tmp_path / "two_parquet"), split="train").features
    assert features["images"] == datasets.List(datasets.Image())


@pytest.mark.parametrize("to", ["parquet", "webdataset"])
def test_a_missing_image_leaves_no_files(file, tmp_path, to):
    (tmp_path / "images" / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="Row 1: image .*b.jpg"):
        write_dataset(load_rows(file), tmp_path / "out", to)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_other_outputs_are_named(file, tmp_path):
    with pytest.raises(ValueError, match="must be parquet or webdataset"):
        write_dataset(load_rows(file), tmp_path / "out", "csv")
