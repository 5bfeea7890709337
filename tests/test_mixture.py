# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Mixtures of datasets: shares, limits, folders, seeds, resuming, and a loss for each dataset."""

import json
from collections import Counter

import datasets
import pytest
import torch
from helpers.training import build_trainer
from PIL import Image

from vtlmm.data.mixture import mix_datasets
from vtlmm.data.rows import load_rows
from vtlmm.train.dataset_checks import check_data
from vtlmm.train.dataset_config import DatasetConfig
from vtlmm.train.recipe import check_settings
from vtlmm.train.run_data import prepare_dataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


COLORS = {"one": "red", "two": "blue"}


@pytest.fixture
def folder(tmp_path):
    """Two files of rows, each with a folder of images of its own."""
    for name, color in COLORS.items():
        (tmp_path / name).mkdir()
        Image.new("RGB", (28, 28), color).save(tmp_path / name / "image.png")
        rows = [
            {"image": "image.png", "question": f"what {i} ?", "answer": name + (i % 4 + 1) * " red"} for i in range(12)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def entries(folder, **shared):
    return [{"name": str(folder / f"{name}.jsonl"), "image_folder": str(folder / name), **shared} for name in COLORS]


def answers(rows):
    return [row["messages"][1]["content"][0]["text"].split()[0] for row in rows]


def source(name, number, streaming):
    rows = datasets.Dataset.from_list([{"name": name, "number": i} for i in range(number)])
    return rows.to_iterable_dataset() if streaming else rows


@pytest.mark.parametrize("streaming", [False, True])
def test_shares_seeds_and_repetition(streaming):
    parts = [source("a", 300, streaming), source("b", 300, streaming)]
    mixed = list(mix_datasets(parts, [3, 1], seed=0))
    counts = Counter(row["name"] for row in mixed[:400])
    assert 270 < counts["a"] < 330  # 75 % of 400, 3.5 standard deviations
    assert len({(row["name"], row["number"]) for row in mixed}) == 600  # "a" starts again until "b" ends
    assert mixed == list(mix_datasets(parts, [0.75, 0.25], seed=0)) != list(mix_datasets(parts, [3, 1], seed=1))
    short = [source("a", 3, streaming), source("b", 5, streaming)]
    once = [(row["name"], row["number"]) for row in mix_datasets(short)]
    assert sorted(once) == [("a", i) for i in range(3)] + [("b", i) for i in range(5)]
    assert mix_datasets(short[:1], [2.0]) is short[0]


@pytest.mark.parametrize("weights", [[1, None], [1, 0], [1, -1], [1, "2"], [True, 1], [1, float("nan")]])
def test_invalid_weights(weights):
    with pytest.raises(ValueError, match="weight"):
        mix_datasets([source("a", 3, False), source("b", 3, False)], weights)


@pytest.mark.parametrize("streaming", [False, True])
def test_each_dataset_has_its_folder_and_limit(folder, processor, streaming):
    first, second = entries(folder)
    config = DatasetConfig([{**first, "max_rows": 2}, second], max_rows=5, dataset_streaming=streaming)
    rows = list(prepare_dataset(config, "train", processor, 100))
    assert Counter(answers(rows)) == {"one": 2, "two": 5}
    colors = {"one": (255, 0, 0), "two": (0, 0, 255)}
    assert all(
        row["images"][0].getpixel((0, 0)) == colors[name] for name, row in zip(answers(rows), rows, strict=True)
    )
    weighted = DatasetConfig(entries(folder, weight=1), dataset_streaming=streaming)
    orders = [answers(prepare_dataset(weighted, "train", processor, 100, seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_the_check_names_dataset_and_row(folder, processor):
    (folder / "two" / "image.png").unlink()
    settings = {"dataset_name": entries(folder), "model_name_or_path": str(folder / "model")}
    processor.save_pretrained(folder / "model")
    from helpers.tiny_models import build_config

    build_config().save_pretrained(folder / "model")
    reports = dict(check_data(settings))
    assert list(reports) == ["train, one", "train, two"]
    assert not reports["train, one"].problems and reports["train, two"].problems[0].row == 0


@pytest.mark.parametrize(
    ("names", "message"),
    [([{"weight": 1}], r"dataset_name\[0\]` has no `name"), (["a", {"name": "b", "wieght": 1}], "'weight'")],
)
def test_invalid_entries(names, message):
    with pytest.raises(ValueError, match=message):
        DatasetConfig(names)


def test_a_recipe_may_have_a_list_or_a_text():
    for value in ("rows.json", ["a.json", {"name": "b.json", "weight": 2}]):
        assert check_settings({"dataset_name": value}, "recipe") == {"dataset_name": value}


@pytest.mark.slow
def test_a_resumed_stream_continues_the_mix(folder, processor, tmp_path):
    config = DatasetConfig(entries(folder, weight=1), dataset_streaming=True)
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.1, "save_steps": 2}
    settings |= {"save_strategy": "steps", "optim": "adamw_torch"}

    def trainer(name):
        return build_trainer(tmp_path / name, prepare_dataset(config, "train", processor, 100), **settings)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    logged = [
        {key: value for key, value in run.state.log_history[3].items() if key.startswith(("one_", "two_"))}
        for run in (whole, resumed)
    ]
    assert logged[0] == logged[1] and logged[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"streaming": True, "per_device_train_batch_size": 5},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"packing": True, "max_length": 60, "per_device_train_batch_size": 2, "stage": "visual_head"},
    ],
)
def test_each_dataset_has_a_training_loss(folder, processor, tmp_path, settings):
    settings = dict(settings)
    streaming = settings.pop("streaming", False)
    settings |= {"max_steps": 4 if streaming else -1, "num_train_epochs": 1}
    settings |= {"logging_strategy": "epoch", "learning_rate": 0.0, "shuffle_dataset": True}
    first, second = entries(folder)
    mixture = [{**first, "max_rows": 6}, second]

    def first_epoch(name, dataset_name):
        config = DatasetConfig(dataset_name, dataset_streaming=streaming)
        trainer = build_trainer(tmp_path / name, prepare_dataset(config, "train", processor, 60), **settings)
        trainer.train()
        return trainer.state.log_history[0]

    together = first_epoch("both", mixture)
    losses = [name for name in ("lm_loss", "visual_loss") if name in together]
    assert len(losses) == (1 if "stage" in settings else 2)
    for name, entry in zip(COLORS, mixture, strict=True):
        alone = first_epoch(name, [entry])
        for loss in losses:
            assert together[f"{name}_{loss}"] == pytest.approx(alone[loss], rel=1e-6)
            assert together[f"{name}_{loss}"] != pytest.approx(together[loss], rel=1e-4)


@pytest.mark.slow
def test_each_test_split_has_a_loss(folder, processor, tmp_path):
    config = DatasetConfig(entries(folder, test_split="train[:4]"))
    tests = prepare_dataset(config, "eval", processor, 100)
    assert {name: len(rows) for name, rows in tests.items()} == {"one": 4, "two": 4}
    trainer = build_trainer(tmp_path / "run", load_rows(str(folder / "one.jsonl"), image_folder=str(folder / "one")))
    together = build_trainer(tmp_path / "both", trainer.train_dataset, eval_dataset=tests)
    metrics = together.evaluate()
    for name, rows in tests.items():
        alone = build_trainer(tmp_path / name, trainer.train_dataset, eval_dataset=rows).evaluate()
        assert metrics[f"eval_{name}_lm_loss"] == pytest.approx(alone["eval_lm_loss"], rel=1e-6)
