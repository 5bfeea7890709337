# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The generated model card."""

import html
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.tiny_models import build_config, build_processor
from huggingface_hub import ModelCard, parse_eval_result_entries
from matplotlib.axes import Axes
from PIL import Image

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.hub.model_card import write_card
from vtlmm.hub.private_values import remove_private_values
from vtlmm.hub.repository import read_run_record


LINE = {"n": 40, "images": 9, "score": 0.75, "low": 0.6, "high": 0.9, "score_shuffled_images": 0.25}
LINE |= {"low_shuffled_images": 0.1, "high_shuffled_images": 0.4}
RUN = {
    "stage": "joint",
    "plan": ["Stage joint: loss = 1 · L_lm + 1 · L_vm", "  vm_head  1,000 parameters  0 learn"],
    "settings": {
        "model_name_or_path": "/home/me/start",
        "dataset_name": "someone/images",
        "image_folder": "/home/me/p",
        "seed": 3,
        "hub_token": "hf_SECRET",
        "run_name": "me at home",
        "wandb": {"api_key": "12345", "note": "a|b", "folder": "/home/me/logs"},
    },
    "learning_rate": 2e-5,
    "steps": 100,
    "epochs": 1.0,
    "rows": 800,
    "processes": 8,
    "device": "a GPU",
    "seconds": 7200.0,
    "curves": {"lm_loss": [[50, 2.0], [100, 1.5]], "eval_lm_loss": [[100, 1.25]], "visual_loss": [[100, 0.5]]},
    "metrics": {"eval_lm_loss": 1.25, "eval_visual_loss": 0.5, "eval_runtime": 9},
    "versions": {"torch": "2.8", "vtlmm": "0.1.0"},
    "commit": "abc1234",
}


@pytest.fixture
def folder(tmp_path):
    config = build_config()
    config.text_config._name_or_path, config.vision_config._name_or_path = "someone/decoder", "someone/tower"
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "model/vtlmm_run.json").write_text(json.dumps([{**RUN, "stage": "decoder"}, RUN]))
    return tmp_path / "model"


def write_results(path, data: str, subset: str | None = None, scorer: str = "exact", split: str = "test"):
    values = {"model": "/home/me/model", "data": data, "split": split, "subset": subset, "scorer": scorer}
    path.write_text(json.dumps({**values, "kinds": [{"kind": "count", **LINE}, {"kind": "all", **LINE}]}))
    return path


def test_card_describes_training_and_results(folder, tmp_path):
    results = [
        write_results(tmp_path / "a.json", "someone/questions"),
        write_results(tmp_path / "b.json", "/home/me/rows.json", "the first 40 of 90 rows"),
    ]
    images = [tmp_path / "patches.png", tmp_path / "0_row 3, image 1.png"]
    for image in images:
        image.write_bytes(b"")
    write_card(folder, "me/model", license="llama2", results=results, images=images)
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    index = data.pop("model-index")
    assert data == {
        "license": "llama2",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vt-lmm", "conversational", "visual-tokens", "trl"],
        "base_model": ["someone/decoder", "someone/tower"],
        "base_model_relation": "finetune",
        "datasets": ["someone/images"],
    }
    (result,) = index[0]["results"]
    assert result["dataset"] == {"name": "someone/questions", "type": "someone/questions", "split": "test"}
    assert [metric["value"] for metric in result["metrics"]] == [0.75, 0.25]
    assert "| joint | start | someone/images | 800 | 100 | 1 | 2e-05 | 8 × a GPU | 2 |" in card.text
    assert "lm_loss 1.25, visual_loss 0.5 |" in card.text and "commit abc1234" in card.text
    assert "| count | 40 | 75.0% | 60.0% – 90.0% | 25.0% | 10.0% – 40.0% |" in card.text
    assert not any(text in card.text for text in ("hf_SECRET", "12345", "me at home"))
    assert "a&#124;b" in card.text and "# VT-LMM: tower + decoder" in card.text
    assert "subset: the first 40 of 90 rows" in card.text and "![patches.png](patches.png)" in card.text
    assert "](0_row%203%2C%20image%201.png)" in card.text
    assert "| setting | decoder | joint |" in card.text and "| seed | 3 | 3 |" in card.text
    assert "…" not in card.text and "inproceedings{peng2024multimodal" in card.text
    published = [card.text, *(file.read_text() for file in (folder / "results").iterdir())]
    assert len(published) == 3 and not any("/home/me" in text for text in published)
    (file,) = (folder / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.value) == ("someone/questions", 0.75) and "0.25" in entry.notes


def test_card_shows_the_last_patch_words_of_the_training(folder, tmp_path):
    """Images that the user passes replace them, and a later push finds newer ones."""
    (folder / "patch_words").mkdir()
    for step in (100, 200, 300):
        (folder / f"patch_words/step_{step:06d}.png").write_bytes(str(step).encode())
        write_card(folder, "me/model", license="mit")
        text = (folder / "README.md").read_text()
        assert text.count("![patch_words.png](patch_words.png)") == 1 and "word of each patch of some" in text
        assert (folder / "patch_words.png").read_bytes() == str(step).encode()
    (tmp_path / "mine.png").write_bytes(b"")
    (folder / "README.md").unlink()
    write_card(folder, "me/model", license="mit", images=[tmp_path / "mine.png"])
    assert "![mine.png](mine.png)" in (folder / "README.md").read_text()
    write_card(folder, "me/model", license="mit")
    text = (folder / "README.md").read_text()
    assert "![mine.png](mine.png)" in text and "patch_words.png" not in text


def test_results_do_not_replace_each_other(folder, tmp_path):
    """A subset and the whole data set are two results. A local file has no split."""
    whole = write_results(tmp_path / "a.json", "/home/me/one/test.parquet")
    part = write_results(tmp_path / "b.json", "/home/me/one/test.parquet", "the first 40 of 90 rows")
    write_card(folder, "me/model", license="mit", results=[whole, part])
    text = (folder / "README.md").read_text()
    assert len(list((folder / "results").iterdir())) == 2 and "split test" not in text
    assert "**test.parquet**, scorer exact\n" in text
    scored = [write_results(tmp_path / f"{name}.json", "someone/set", scorer=name) for name in ("exact", "vqa")]
    write_card(folder, "me/model", license="mit", results=scored)
    entries = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results/someone_set.yaml").read_text()))
    notes = [entry.notes.partition(";")[0] for entry in entries]
    assert notes == ["split test, scorer exact", "split test, scorer vqa"]
    for split in ("train", "test[:50]"):
        table = write_results(tmp_path / "d.json", "someone/other", split=split)
        write_card(folder, "me/model", license="mit", results=[table])
        card = ModelCard.load(folder / "README.md")
        assert f"split {split}" in html.unescape(card.text) and "someone/other" not in str(card.data.to_dict())
    assert not (folder / ".eval_results/someone_other.yaml").exists()
    other = write_results(tmp_path / "c.json", "/home/me/two/test.parquet")
    with pytest.raises(ValueError, match="Two results files would both be published as"):
        write_card(folder, "me/model", license="mit", results=[whole, other])


def test_card_is_reproducible_and_a_card_by_hand_stays(folder, tmp_path):
    results = [write_results(tmp_path / "a.json", "someone/questions")]
    write_card(folder, "me/model", license="mit", base_models=["someone/else"], results=results)
    first = (folder / "README.md").read_text()
    (folder / "patches.png").write_bytes(b"")
    write_card(folder, "me/model", images=[folder / "patches.png"])
    assert (folder / "README.md").read_text().replace("\n![patches.png](patches.png)\n", "") == first
    assert "- someone/else" in first
    by_hand = "---\nlicense: mit\n---\nMine.\n"
    (folder / "README.md").write_text(by_hand)
    write_card(folder, "me/model", license="apache-2.0")
    assert (folder / "README.md").read_text() == by_hand


def test_curves_of_all_stages(folder, monkeypatch):
    """Each stage starts at the last step of the one before. Without matplotlib there is no plot."""
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda *args, label: drawn.append((label, args[1:])) or plot(*args, label=label))
    write_card(folder, "me/model")
    assert drawn[:2] == [
        ("decoder", ((50, 100), (2.0, 1.5), "-")),
        ("decoder, held out", ((100,), (1.25,), "o")),
    ]
    assert ("joint", ((150, 200), (2.0, 1.5), "-")) in drawn and ("joint", ((200,), (0.5,), "-")) in drawn
    assert Image.open(folder / "curves.png").size == (840, 320)
    assert (folder / "README.md").read_text().count("(curves.png)") == 1
    (folder / "curves.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_card(folder, "me/model")
    assert "curves.png" not in (folder / "README.md").read_text()


def test_license_text_is_written_for_our_license(folder):
    write_card(folder, "me/model", license="apache-2.0")
    assert (folder / "LICENSE").read_text() == Path(__file__).parents[1].joinpath("LICENSE").read_text()
    write_card(folder, "me/model", license="llama2")
    assert not (folder / "LICENSE").exists()
    (folder / "LICENSE").write_text("Theirs.")
    write_card(folder, "me/model", license="apache-2.0")
    assert (folder / "LICENSE").read_text() == "Theirs."


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "(?s)`vtlmm export me/model --to llava .*`vtlmm export me/model --to gguf"),
        ({"use_pseudo_image_features": True}, "(?s)cannot be exported .* its decoder reads pseudo image features"),
        ({"vision": "convnext"}, "(?s)cannot be exported .* its vision tower is a convnext"),
    ],
)
def test_card_says_whether_the_model_can_be_exported(tmp_path, options, said):
    build_config(**options).save_pretrained(tmp_path)
    write_card(tmp_path, "me/model")
    assert re.search(said, (tmp_path / "README.md").read_text())


def test_results_beside_the_model_are_published(folder, tmp_path):
    (tmp_path / "eval").mkdir()
    write_results(tmp_path / "eval/results.json", "someone/questions")
    values = json.loads((tmp_path / "eval/results.json").read_text())
    (tmp_path / "eval/results.json").write_text(json.dumps({**values, "model": str(folder)}))
    (tmp_path / "other").mkdir()
    write_results(tmp_path / "other/results.json", "someone/other")  # of another model
    write_card(folder, "me/model", license="mit")
    assert [file.name for file in (folder / "results").iterdir()] == ["someone_questions_test_exact.json"]
    assert "someone/other" not in (folder / "README.md").read_text()


def test_snippet_of_the_card_runs(tmp_path, monkeypatch):
    """Only the repository and the image are replaced by local files."""
    torch.manual_seed(0)
    model = tmp_path / "model"
    VTLMMForConditionalGeneration(build_config()).save_pretrained(model)
    build_processor().save_pretrained(model)
    write_card(model, "me/model", license="mit")
    snippet = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(), re.DOTALL)[0]
    Image.new("RGB", (40, 30)).save(tmp_path / "bee.png")
    snippet = re.sub(r"https://\S+bee\.jpg", str(tmp_path / "bee.png"), snippet).replace("me/model", str(model))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    exec(compile(snippet, "card", "exec"), {})


def test_private_values_are_removed_at_every_depth():
    values = {"a": {"hub_token": "x", "list": ["hf_abcdefgh", "/home/me/data.json"], "url": "https://me:pw@host/x"}}
    assert remove_private_values(values) == {"a": {"list": ["data.json"]}}
    assert remove_private_values({"max_new_tokens": 3, "dataset_name": "someone/set"}) == {
        "max_new_tokens": 3,
        "dataset_name": "someone/set",
    }


def test_results_of_older_weights_are_not_published(folder, tmp_path):
    (tmp_path / "eval").mkdir()
    write_results(tmp_path / "eval/results.json", "someone/questions")
    values = json.loads((tmp_path / "eval/results.json").read_text())
    (tmp_path / "eval/results.json").write_text(json.dumps({**values, "model": str(folder)}))
    (folder / "model.safetensors").write_bytes(b"")
    os.utime(tmp_path / "eval/results.json", (1, 1))
    write_card(folder, "me/model", license="mit")
    assert "someone/questions" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"kinds": {}},
        {"kinds": ["all"]},
        {"kinds": [{"kind": "all", "n": 3, "score": "1"}]},
        {"kinds": [{"kind": "all", "n": "3", "score": 1}]},
        {"data": 3},
        {"scorer": None},
    ],
)
def test_results_of_a_wrong_type_are_rejected(folder, tmp_path, change):
    write_results(tmp_path / "results.json", "someone/questions")
    values = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(ValueError, match="results.json contains no results"):
        write_card(folder, "me/model", results=[tmp_path / "results.json"])


@pytest.mark.parametrize("text", ["{}", "[3]", '[{"stage": "joint"}]', '[{"stage": "joint", "settings": []}]', "["])
def test_a_damaged_run_record_is_named(folder, text):
    (folder / "vtlmm_run.json").write_text(text)
    with pytest.raises(ValueError, match="vtlmm_run.json"):
        write_card(folder, "me/model")
    with pytest.raises(ValueError, match="vtlmm_run.json"):
        read_run_record(folder)


def test_invalid_results_and_images_are_rejected(folder, tmp_path):
    (tmp_path / "a.json").write_text('{"accuracy": 1}')
    with pytest.raises(ValueError, match="a.json contains no results. Pass a results.json"):
        write_card(folder, "me/model", results=[tmp_path / "a.json"])
    with pytest.raises(ValueError, match="a.json is not a PNG file"):
        write_card(folder, "me/model", images=[tmp_path / "a.json"])
