# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The card that a folder writes itself."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import build_config
from huggingface_hub import ModelCard, parse_eval_result_entries
from matplotlib.axes import Axes
from PIL import Image

from vtlmm.hub.model_card import write_card


LINE = {"n": 40, "images": 9, "score": 0.75, "low": 0.6, "high": 0.9, "blind": 0.25, "blind_low": 0.1}
LINE |= {"blind_high": 0.4}
RUN = {
    "stage": "joint",
    "plan": ["Stage joint: loss = 1 · L_lm + 1 · L_vm", "  vm_head  1,000 parameters  0 learn"],
    "settings": {
        "model_name_or_path": "/home/me/start",
        "dataset_name": "someone/images",
        "image_folder": "/home/me/p",
        "seed": 3,
        "hub_token": "hf_SECRET",
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


def test_a_card_says_what_was_done_and_measured(folder, tmp_path):
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
    (result,) = index[0]["results"]  # that of the subset is no result on the data set
    assert result["dataset"] == {"name": "someone/questions", "type": "someone/questions", "split": "test"}
    assert [metric["value"] for metric in result["metrics"]] == [0.75, 0.25]
    assert "| joint | start | someone/images | 800 | 100 | 1 | 2e-05 | 8 × a GPU | 2 |" in card.text
    assert "lm_loss 1.25, visual_loss 0.5 |" in card.text and "commit abc1234" in card.text
    assert "| count | 40 | 75.0% | 60.0% – 90.0% | 25.0% | 10.0% – 40.0% |" in card.text
    assert "hf_SECRET" not in card.text  # old records have it
    assert "SUBSET: the first 40 of 90 rows" in card.text and "![patches.png](patches.png)" in card.text
    assert "](0_row%203%2C%20image%201.png)" in card.text
    assert '"revision": "…"' in card.text and "inproceedings{peng2024multimodal" in card.text
    published = [card.text, *(file.read_text() for file in (folder / "results").iterdir())]
    assert len(published) == 3 and not any("/home/me" in text for text in published)
    (file,) = (folder / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.value) == ("someone/questions", 0.75) and "0.25" in entry.notes


def test_results_do_not_replace_each_other(folder, tmp_path):
    """A part of the data is not the whole; a file is one split, whatever the loader calls it."""
    whole = write_results(tmp_path / "a.json", "/home/me/one/test.parquet")
    part = write_results(tmp_path / "b.json", "/home/me/one/test.parquet", "the first 40 of 90 rows")
    write_card(folder, "me/model", license="mit", results=[whole, part])
    text = (folder / "README.md").read_text()
    assert len(list((folder / "results").iterdir())) == 2 and "split test" not in text
    assert "**test.parquet**, scorer exact." in text
    scored = [write_results(tmp_path / f"{name}.json", "someone/set", scorer=name) for name in ("exact", "vqa")]
    write_card(folder, "me/model", license="mit", results=scored)
    entries = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results/someone_set.yaml").read_text()))
    notes = [entry.notes.partition(";")[0] for entry in entries]
    assert notes == ["split test, scorer exact", "split test, scorer vqa"]
    for split in ("train", "test[:50]"):
        table = write_results(tmp_path / "d.json", "someone/other", split=split)
        write_card(folder, "me/model", license="mit", results=[table])
        card = ModelCard.load(folder / "README.md")
        assert f"split {split}" in card.text and "someone/other" not in str(card.data.to_dict())
    assert not (folder / ".eval_results/someone_other.yaml").exists()  # it would stand on the data set's leaderboard
    other = write_results(tmp_path / "c.json", "/home/me/two/test.parquet")
    with pytest.raises(ValueError, match="Two of the results would be one file"):
        write_card(folder, "me/model", license="mit", results=[whole, other])


def test_a_card_is_written_again_as_it_was_and_one_by_hand_stays(folder, tmp_path):
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


def test_the_curves_of_all_stages(folder, monkeypatch):
    """A stage begins where the one before it ended. Without matplotlib there is no image, and the card says none."""
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


def test_the_licence_s_text_is_there_when_it_is_ours(folder):
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
        ({}, "`vtlmm convert me/model --to llava"),
        ({"use_pseudo_image_features": True}, "There is no native twin .* its decoder reads pseudo image features"),
        ({"vision": "convnext"}, "There is no native twin .* its vision tower is a convnext"),
    ],
)
def test_a_twin_is_promised_where_there_is_one(tmp_path, options, said):
    build_config(**options).save_pretrained(tmp_path)
    write_card(tmp_path, "me/model")
    assert re.search(said, (tmp_path / "README.md").read_text())


def test_results_that_are_none_are_refused(folder, tmp_path):
    (tmp_path / "a.json").write_text('{"accuracy": 1}')
    with pytest.raises(ValueError, match="a.json holds no results: pass a results.json"):
        write_card(folder, "me/model", results=[tmp_path / "a.json"])
    with pytest.raises(ValueError, match="a.json is no PNG"):
        write_card(folder, "me/model", images=[tmp_path / "a.json"])
