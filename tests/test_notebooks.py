# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The notebooks in examples/ are clean, and their cells run in order at toy size."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers.composition import decoder_folder, tower_folder  # noqa: F401 - fixtures
from helpers.tiny_models import build_config, build_tokenizer, scale_weights
from transformers import AutoModelForCausalLM

import vtlmm
from vtlmm.hub.compose import compose_model
from vtlmm.hub.export_llava import export_to_llava


NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


def read_cells(path: Path, kind: str = "code") -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def run_notebook(name: str, **settings) -> dict:
    """Run the code cells in the working directory with `settings` in place of the first cell's; return the names."""
    pytest.importorskip("matplotlib").use("Agg")
    [path] = [path for path in NOTEBOOKS if path.stem == name]
    names: dict = {}
    for number, code in enumerate(read_cells(path)):
        exec(compile(code, f"{path.name}, code cell {number + 1}", "exec"), names)
        if number == 0:
            assert settings.keys() <= names.keys()
            names |= settings
    return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    """No outputs, settings in the first code cell, then an installation that an installed package skips."""
    values = json.loads(path.read_text(encoding="utf-8"))
    assert (values["nbformat"], values["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in values["cells"]]
    assert len(set(ids)) == len(ids)
    code = [cell for cell in values["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    trees = [ast.parse("".join(cell["source"])) for cell in code]
    assert all(isinstance(node, ast.Assign) for node in trees[0].body)
    assert 'find_spec("vtlmm") is None' in "".join(code[1]["source"])
    assert "colab-badge.svg" in read_cells(path, "markdown")[0]
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "vtlmm":
                assert [alias.name for alias in node.names if not hasattr(vtlmm, alias.name)] == []


@pytest.fixture(scope="module")
def word_decoder(tmp_path_factory) -> str:
    """Return the folder of a decoder whose tokens are words, so that captions have candidate words."""
    folder, tokenizer = tmp_path_factory.mktemp("decoder"), build_tokenizer()
    torch.manual_seed(0)
    scale_weights(AutoModelForCausalLM.from_config(build_config().text_config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_quickstart_and_visual_tokens_run(word_decoder, tower_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = {"VISION": tower_folder("siglip"), "TEXT": word_decoder}
    names = run_notebook("quickstart", **parts, NUM_IMAGES=40, STEPS=2)
    assert names["result"].report.problems == [] and "model.safetensors" in names["result"].files
    assert len(names["losses"]) == 2 and Path("outputs/quickstart/model.safetensors").is_file()
    names = run_notebook("visual_tokens", LIMIT=8)
    assert {"vm_head", "random_head", "decoder", "layer_0"} <= names["agreements"].keys()
    assert "vqa_score" in names["measured"] and names["result"].num_images == 8


@pytest.mark.slow
def test_qlora_llava_runs(tower_folder, decoder_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_4bit = importlib.util.find_spec("bitsandbytes") is not None
    compose_model(tower_folder("clip"), decoder_folder("llama"), "composed", dtype="float32")
    export_to_llava("composed", "llava")
    settings = {"load_in_4bit": in_4bit, "dtype": "float32", "use_cpu": True, "lora_r": 2, "max_steps": 2}
    settings |= {"per_device_train_batch_size": 2, "warmup_steps": 0}
    names = run_notebook("qlora_llava", MODEL="llava", NUM_IMAGES=4, SETTINGS=settings)
    assert names["adapter"] == Path("outputs/llava/joint")
    assert Path("outputs/llava/merged/model.safetensors").is_file() and isinstance(names["answer"], str)
    folders = ("outputs/llava/start", "outputs/llava/visual_head/merged")
    weights = [vtlmm.load_model(folder).model.model.vm_head.weight for folder in folders]
    assert not torch.equal(*weights)  # stage III trained it
