# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Damaged folders, each damage named. (An intact one: test_push.py, by id and as a twin.)"""

import json
import shutil

import pytest
import torch
from conftest import build_config, build_processor
from safetensors.torch import load_file, save_file

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor
from vtlmm.cli.main import main
from vtlmm.hub import isolated_load
from vtlmm.hub.isolated_load import differences, probe
from vtlmm.hub.model_card import write_card
from vtlmm.hub.push import record_logits


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete folder in two shards, in bfloat16."""
    path = tmp_path_factory.mktemp("whole") / "model"
    torch.manual_seed(0)
    model = VTLMMForConditionalGeneration(build_config()).bfloat16()
    model.save_pretrained(path, max_shard_size="50KB")
    build_processor().save_pretrained(path)
    record_logits(path)
    write_card(path, "somebody/model", license="apache-2.0")
    (path / ".eval_results").mkdir()
    (path / ".eval_results/vqa.yaml").write_text("- dataset: {id: someone/vqa, task_id: default}\n  value: 0.5\n")
    # what training leaves beside a model is no part of it
    (path / "checkpoint-2").mkdir()
    for name in ("checkpoint-2/optimizer.bin", "training_args.bin"):
        (path / name).write_bytes(b"")
    return path


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def edit_json(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_text(file, old: str, new: str):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def change_weight(folder, name: str, change):
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file(change(tensors, name), file, metadata={"format": "pt"})


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


DAMAGES = {
    "code file": (lambda f: (f / "layers_vtlmm.py").unlink(), "layers_vtlmm.py: this code file is missing"),
    "class": (
        lambda f: edit_text(f / "processing_vtlmm.py", "class VTLMMProcessor(", "class Processor("),
        "processing_vtlmm.py: the class VTLMMProcessor, which the auto_map names, is not in it",
    ),
    "auto_map": (
        lambda f: edit_json(f / "config.json", lambda c: c["auto_map"].pop("AutoModelForCausalLM")),
        "config.json: auto_map should have AutoModelForCausalLM: modeling_vtlmm.VTLMMForConditionalGeneration",
    ),
    "processor's auto_map": (
        lambda f: edit_json(f / "processor_config.json", lambda c: c.pop("auto_map")),
        "processor_config.json: auto_map should have AutoProcessor",
    ),
    "shard": (lambda f: (f / SHARDS[1]).unlink(), f"index.json names files that are not there: {SHARDS[1]}"),
    "shard of another": (
        lambda f: shutil.copy(f / SHARDS[0], f / SHARDS[1]),
        f"{SHARDS[1]} lacks tensors that its index says it has: ",
    ),
    "shard too many": (
        lambda f: shutil.copy(f / SHARDS[0], f / "model.safetensors"),
        "model.safetensors: the index does not name it: remove it",
    ),
    "tensor": (
        lambda f: change_weight(f, "model.vm_head.weight", without),
        "lacks tensors that its index says it has: model.vm_head.weight",
    ),
    "shape": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(visual_vocab_size=40)),
        "of another shape than the config says: model.vm_head.weight",
    ),
    "pickle": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b""),
        "pytorch_model.bin: only safetensors are published",
    ),
    "processor": (lambda f: (f / "processor_config.json").unlink(), "processor_config.json: missing"),
    "tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "chat template": (lambda f: (f / "chat_template.jinja").unlink(), "chat_template.jinja: missing"),
    "end of answers": (
        lambda f: edit_json(f / "generation_config.json", lambda c: c.update(eos_token_id=99)),
        "generation_config.json: eos_token_id is 99, and the decoder has 64 words",
    ),
    "generation": (
        lambda f: edit_json(f / "generation_config.json", lambda c: c.update(temperature=0.5, do_sample=False)),
        "generation_config.json: ",
    ),
    "card": (lambda f: (f / "README.md").unlink(), "README.md: missing"),
    "front matter": (
        lambda f: edit_text(f / "README.md", "tags:\n", "tags: [\n"),
        "README.md: the front matter cannot be read: while parsing",
    ),
    "license": (
        lambda f: edit_text(f / "README.md", "license: apache-2.0\n", ""),
        "README.md: the front matter has no `license`",
    ),
    "library": (
        lambda f: edit_text(f / "README.md", "library_name: transformers", "library_name: peft"),
        "README.md: `library_name` of the front matter is 'peft', not 'transformers'",
    ),
    "base": (
        lambda f: edit_text(f / "README.md", "tags:\n", "base_model: /models/vicuna\ntags:\n"),
        "README.md: the base model '/models/vicuna' is no Hub id",
    ),
    "model-index": (
        lambda f: edit_text(f / "README.md", "tags:\n", "model-index:\n- name: model\n  results: [{}]\ntags:\n"),
        "README.md: the front matter cannot be read: ",
    ),
    "results": (
        lambda f: edit_text(f / ".eval_results/vqa.yaml", "task_id", "task"),
        ".eval_results/vqa.yaml: no list of evaluation results: ",
    ),
    "record": (lambda f: (f / "vtlmm_check.json").unlink(), "vtlmm_check.json: no recorded logits"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(folder, capsys, name):
    damage, said = DAMAGES[name]
    damage(folder)
    assert main(["verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert said in lines[1] and "2 problems" in lines[0], lines  # that one, and that it was not loaded
    assert lines[2].strip() == "not loaded: first mend what is named above"


def test_a_changed_weight_is_seen_in_the_logits(folder, capsys):
    """One row of each head, by the process that loads the folder and compares as far as bfloat16 allows."""

    def change(tensors, name):
        tensors[name][7] *= 1.5
        return tensors

    for head in ("lm_head.weight", "model.vm_head.weight"):
        change_weight(folder, head, change)
    assert main(["verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "2 problems" in lines[0] and [line.split()[0] for line in lines[1:]] == ["logits", "visual_logits"]


def test_as_much_may_differ_as_16_bits_round(whole):
    """The same weights added up in float32 are another machine to the record in bfloat16: more than float32 allows,
    less than bfloat16 does. A layer less is more than either."""
    recorded = json.loads((whole / "vtlmm_check.json").read_text())
    model = VTLMMForConditionalGeneration.from_pretrained(whole, dtype=torch.float32)
    found = probe(model, VTLMMProcessor.from_pretrained(whole))
    assert len(differences(found, recorded, torch.float32)) == 2
    assert not differences(found, recorded, torch.bfloat16)
    model.model.language_model.layers = model.model.language_model.layers[:1]
    found = probe(model, VTLMMProcessor.from_pretrained(whole))
    (said,) = differences(found, recorded, torch.bfloat16)
    assert said.startswith("logits differ from the recorded ones")


@pytest.mark.parametrize(("change", "device"), [({}, "cpu"), ({"quantization_config": {"load_in_8bit": True}}, None)])
def test_the_pipeline_takes_no_gpu(folder, monkeypatch, change, device):
    """A model that is too large for this machine's is right all the same; bitsandbytes places its own."""
    found = {}
    monkeypatch.setattr(isolated_load, "pipeline", lambda *args, **kwargs: found.update(kwargs))
    edit_json(folder / "config.json", lambda config: config.update(change))
    isolated_load.load(
        {"name": str(folder), "revision": None, "trust_remote_code": True, "classes": [], "recorded": None}
    )
    assert found["device"] == device


def test_no_model_and_no_folder(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert main(["verify", str(tmp_path)]) == 1
    assert main(["verify", "some/model/that/is/not"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "no model is in it" in said[0] and "is 'bert'; it must be" in said[1]
