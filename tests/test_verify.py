# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm verify` names each kind of damage. Complete repositories are tested in test_push.py."""

import json
import shutil

import pytest
import torch
from helpers.tiny_models import build_config, build_processor
from safetensors.torch import load_file, save_file

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor
from vtlmm.cli.main import main
from vtlmm.hub import isolated_load, verify
from vtlmm.hub.isolated_load import differences, probe
from vtlmm.hub.model_card import write_card
from vtlmm.hub.push import push_model, record_logits
from vtlmm.hub.repository_checks import CONFIG_FILES
from vtlmm.hub.verify import verify_checkpoint


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a complete folder in bfloat16, with two shards."""
    path = tmp_path_factory.mktemp("whole") / "model"
    torch.manual_seed(0)
    model = VTLMMForConditionalGeneration(build_config()).bfloat16()
    model.save_pretrained(path, max_shard_size="50KB")
    build_processor().save_pretrained(path)
    record_logits(path)
    write_card(path, "somebody/model", license="apache-2.0")
    (path / ".eval_results").mkdir()
    (path / ".eval_results/vqa.yaml").write_text("- dataset: {id: someone/vqa, task_id: default}\n  value: 0.5\n")
    # Files of a training, which are not published.
    (path / "checkpoint-2").mkdir()
    for name in ("checkpoint-2/optimizer.bin", ".env"):
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
        "processing_vtlmm.py: the class VTLMMProcessor, which `auto_map` names, is missing",
    ),
    "auto_map": (
        lambda f: edit_json(f / "config.json", lambda c: c["auto_map"].pop("AutoModelForCausalLM")),
        "config.json: `auto_map` must map AutoModelForCausalLM to modeling_vtlmm.VTLMMForConditionalGeneration",
    ),
    "processor's auto_map": (
        lambda f: edit_json(f / "processor_config.json", lambda c: c.pop("auto_map")),
        "processor_config.json: `auto_map` must map AutoProcessor",
    ),
    "shard": (lambda f: (f / SHARDS[1]).unlink(), f"index.json names missing files: {SHARDS[1]}"),
    "shard of another": (
        lambda f: shutil.copy(f / SHARDS[0], f / SHARDS[1]),
        f"{SHARDS[1]}: tensors that the index lists are missing: ",
    ),
    "shard too many": (
        lambda f: shutil.copy(f / SHARDS[0], f / "model.safetensors"),
        "model.safetensors: the index does not name this file; remove it",
    ),
    "tensor": (
        lambda f: change_weight(f, "model.vm_head.weight", without),
        "tensors that the index lists are missing: model.vm_head.weight",
    ),
    "shape": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(visual_vocab_size=40)),
        "of a shape that differs from the config: model.vm_head.weight",
    ),
    "processor": (lambda f: (f / "processor_config.json").unlink(), "processor_config.json: missing"),
    "tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "chat template": (lambda f: (f / "chat_template.jinja").unlink(), "chat_template.jinja: missing"),
    "end of answers": (
        lambda f: edit_json(f / "generation_config.json", lambda c: c.update(eos_token_id=99)),
        "generation_config.json: `eos_token_id` is 99, but the vocabulary has 64 tokens",
    ),
    "generation": (
        lambda f: edit_json(f / "generation_config.json", lambda c: c.update(temperature=0.5, do_sample=False)),
        "generation_config.json: ",
    ),
}
WRONG_TYPES = {
    "config.json": ({"text_config": []}, "`text_config` must be an object, but is a list"),
    "processor_config.json": ({"auto_map": "a"}, "`auto_map` must be an object, but is a text"),
    "generation_config.json": ([], "must hold an object, not a list"),
    "tokenizer_config.json": ("text", "must hold an object, not a text"),
    "model.safetensors.index.json": ({"weight_map": []}, "`weight_map` must be an object, but is a list"),
    "vtlmm_check.json": ([], "must hold an object, not a list"),
    "vtlmm_check.json ": ({"input_ids": [1], "logits": 3}, "`logits` must be a list, but is a number"),
    "vtlmm_check.json  ": ({"input_ids": [1], "logits": ["a"]}, "`logits` must hold a number, not a text"),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_json_of_a_wrong_type_is_named(folder, monkeypatch, name):
    value, message = WRONG_TYPES[name]
    file = folder / name.strip()
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **value} if isinstance(value, dict) else value))
    problems = verify_checkpoint(folder).problems
    assert problems[0].startswith(name.strip()) and message in problems[0], problems
    assert problems[1:] == ["not loaded: fix the problems above first"]


@pytest.mark.parametrize("file", CONFIG_FILES[:4] + CONFIG_FILES[5:])
@pytest.mark.parametrize("text", ["[]", "null", "{"])
def test_every_command_names_a_damaged_config(folder, tmp_path, capsys, file, text):
    if file == "adapter_config.json" or not (folder / file).exists():
        pytest.skip("another test")
    (folder / file).write_text(text)
    ours = str(folder)
    for command in (
        ["ask", ours, "what"],
        ["train", "--model_name_or_path", ours, "--dataset_name", "rows.json", "--stage", "joint", "--use_cpu"],
        ["compose", "--vision", ours, "--text", ours, "--output", str(tmp_path / "new")],
        ["verify", ours],
    ):
        assert main(command) == 1
        printed = capsys.readouterr()
        assert file in printed.err + printed.out and "Traceback" not in printed.err, (command, printed)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", '{"model_type": []}'])
def test_a_config_that_is_not_an_object_is_named(folder, capsys, text):
    for file, command in {
        "config.json": ["verify", str(folder)],
        "adapter_config.json": ["ask", str(folder), "what"],
    }.items():
        (folder / file).write_text(text)
        assert main(command) == 1
        error = capsys.readouterr().err
        assert file in error and error.count("\n") == 1
        (folder / file).unlink()


CARD_DAMAGES = {
    "front matter": (
        lambda f: edit_text(f / "README.md", "tags:\n", "tags: [\n"),
        "README.md: the front matter is invalid: while parsing",
    ),
    "library": (
        lambda f: edit_text(f / "README.md", "library_name: transformers", "library_name: peft"),
        "README.md: `library_name` in the front matter is 'peft'; it must be 'transformers'",
    ),
    "base": (
        lambda f: edit_text(f / "README.md", "tags:\n", "base_model: /models/vicuna\ntags:\n"),
        "README.md: the base model '/models/vicuna' is not a Hub id",
    ),
    "model-index": (
        lambda f: edit_text(f / "README.md", "tags:\n", "model-index:\n- name: model\n  results: [{}]\ntags:\n"),
        "README.md: the front matter is invalid: ",
    ),
    "results": (
        lambda f: edit_text(f / ".eval_results/vqa.yaml", "task_id", "task"),
        ".eval_results/vqa.yaml: not a list of evaluation results: ",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(folder, capsys, name):
    damage, text = DAMAGES[name]
    damage(folder)
    assert main(["verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert text in lines[1] and "2 problems" in lines[0], lines  # the second problem: the model was not loaded
    assert lines[2].strip() == "not loaded: fix the problems above first"


@pytest.mark.parametrize("name", CARD_DAMAGES)
def test_invalid_card_is_named_and_the_model_still_loads(folder, monkeypatch, name):
    damage, text = CARD_DAMAGES[name]
    damage(folder)
    monkeypatch.setattr(verify, "load_in_new_process", lambda *arguments: ["loaded"])
    problem, loaded = verify_checkpoint(folder).problems
    assert text in problem and loaded == "loaded"


@pytest.mark.slow
def test_folder_without_card_and_record_gives_warnings(tmp_path, capsys):
    """A composed or trained model that was never pushed is loaded, and is not a failure."""
    torch.manual_seed(0)
    VTLMMForConditionalGeneration(build_config()).save_pretrained(tmp_path)
    build_processor().save_pretrained(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"")
    assert main(["verify", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": OK, 3 warnings")
    assert [line.split(": ")[1] for line in lines[1:]] == ["optimizer.pt", "README.md", "vtlmm_check.json"]


def test_missing_license_gives_a_warning(folder, monkeypatch):
    edit_text(folder / "README.md", "license: apache-2.0\n", "")
    monkeypatch.setattr(verify, "load_in_new_process", lambda *arguments: [])
    report = verify_checkpoint(folder)
    assert not report.problems and "`license` is missing" in report.warnings[0]


FOREIGN_CODE = {
    "changed module": lambda f: (f / "layers_vtlmm.py").write_text((f / "layers_vtlmm.py").read_text() + "RUN"),
    "new module": lambda f: (f / "extra_vtlmm.py").write_text("RUN"),
    "module elsewhere": lambda f: edit_json(
        f / "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["someone/code--tokens.T", None]})
    ),
}


@pytest.mark.parametrize("name", FOREIGN_CODE)
def test_foreign_code_runs_only_with_trust(folder, monkeypatch, name):
    text = FOREIGN_CODE[name]
    text(folder)
    loads = []
    monkeypatch.setattr(verify, "load_in_new_process", lambda *arguments: loads.append(arguments) or [])
    (problem,) = verify_checkpoint(folder).problems
    assert problem.startswith("not loaded: its code differs from the installed package") and not loads
    assert not verify_checkpoint(folder, trust_remote_code=True).problems and len(loads) == 1


@pytest.mark.parametrize("name", FOREIGN_CODE)
def test_push_runs_no_foreign_code(folder, tmp_path, monkeypatch, name):
    FOREIGN_CODE[name](folder)
    for file in folder.glob("*_vtlmm.py"):
        marker = tmp_path / "marker"
        edit_text(file, "RUN", f"\nopen({str(marker)!r}, 'w')\n") if "RUN" in file.read_text() else None
    (folder / "vtlmm_check.json").unlink()  # a push records the logits again
    result = push_model(folder, "somebody/model", dry_run=True)
    assert any("its code differs from the installed package" in problem for problem in result.report.problems)
    assert not (tmp_path / "marker").exists() and result.url is None
    with pytest.raises(ValueError, match="its code differs from the installed package"):
        push_model(folder, "somebody/model", form="llava", dry_run=True)


@pytest.mark.slow
def test_changed_weight_changes_the_logits(folder, capsys):
    """One row of each head is changed; the tolerance of bfloat16 does not hide it."""

    def change(tensors, name):
        tensors[name][7] *= 1.5
        return tensors

    for head in ("lm_head.weight", "model.vm_head.weight"):
        change_weight(folder, head, change)
    assert main(["verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "2 problems" in lines[0] and [line.split()[0] for line in lines[1:]] == ["logits", "visual_logits"]


def test_tolerance_depends_on_the_dtype(whole):
    """The weights computed in float32 differ from the bfloat16 record by more than float32's tolerance."""
    recorded = json.loads((whole / "vtlmm_check.json").read_text())
    model = VTLMMForConditionalGeneration.from_pretrained(whole, dtype=torch.float32)
    values = probe(model, VTLMMProcessor.from_pretrained(whole))
    assert len(differences(values, recorded, torch.float32)) == 2
    assert not differences(values, recorded, torch.bfloat16)
    model.model.language_model.layers = model.model.language_model.layers[:1]
    values = probe(model, VTLMMProcessor.from_pretrained(whole))
    (text,) = differences(values, recorded, torch.bfloat16)
    assert text.startswith("logits differ from the recorded ones")


@pytest.mark.parametrize(("change", "device"), [({}, "cpu"), ({"quantization_config": {"load_in_8bit": True}}, None)])
def test_pipeline_runs_on_the_cpu(folder, monkeypatch, change, device):
    """A GPU may be too small. Models of bitsandbytes choose their device."""
    options = {}
    monkeypatch.setattr(isolated_load, "pipeline", lambda *args, **kwargs: options.update(kwargs))
    edit_json(folder / "config.json", lambda config: config.update(change))
    isolated_load.load(
        {"name": str(folder), "revision": None, "trust_remote_code": True, "classes": [], "recorded": None}
    )
    assert options["device"] == device


def test_folder_without_a_model_is_rejected(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert main(["verify", str(tmp_path)]) == 1
    assert main(["verify", "some/model/that/is/not"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "contains no model" in lines[0] and "is 'bert'; it must be" in lines[1]
    assert "The folder 'some/model/that/is/not' does not exist" in lines[2] and len(lines) == 3
