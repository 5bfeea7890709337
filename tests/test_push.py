# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Pushes to a loopback Hub with the unmodified client. hub_session.py runs them and reports the outcomes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.processes import environment
from huggingface_hub import ModelCard

from vtlmm.hub.model_card import CARD_MARK


pytestmark = pytest.mark.slow


CODE = {file.name for file in Path(__file__).parents[1].glob("modeling_vtlmm/*_vtlmm.py")}
REST = {"chat_template.jinja", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json"}
REST |= {"tokenizer_config.json", "README.md"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
ADDED = {"README.md", "LICENSE", "vtlmm_check.json"}
PROCESSOR = {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    """Return the outcomes of the session by name: exit code, output, error, and commits of each repository."""
    work = tmp_path_factory.mktemp("session")
    command = [sys.executable, "-m", "helpers.hub_session", str(work)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), cwd=work)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.split("FACTS")[-1])


def assert_rejected(fact: dict, *words: str):
    """Check that there is one line on stderr, exit code 1 and no commit."""
    assert fact["code"] == 1 and fact["error"].count("\n") == 1 and not any(fact["commits"].values()), fact
    assert all(word in fact["error"] for word in words), fact["error"]


def test_invalid_push_is_rejected_before_anything_is_written(facts):
    assert_rejected(facts["incomplete"], "The license of the weights is not specified")
    assert_rejected(facts["invalid id"], "'somebody' is invalid")


def test_dry_run_lists_the_files_and_changes_nothing(facts):
    assert facts["dry run"]["code"] == 0 and "model-00001-of-00002.safetensors" in facts["dry run"]["out"]
    assert "Dry run: nothing was pushed" in facts["dry run"]["out"]
    assert facts["unchanged by dry run"] and not facts["requests of both"]


def test_push_is_one_commit_of_known_files(facts):
    """Hidden and unknown files stay; `include` adds one. The same push again makes no commit."""
    assert facts["push"]["code"] == 0 and facts["push"]["commits"] == {"somebody/whole": 1}, facts["push"]
    assert set(facts["files"]) == CODE | REST | SHARDS | ADDED | {"extra.txt"} and facts["private"]
    assert facts["second push"]["code"] == 0 and facts["second push"]["commits"] == {"somebody/whole": 0}
    assert_rejected(facts["link"], "tokenizer.model is a symbolic link")


def test_failed_push_changes_nothing(facts):
    """The first push fails in a shard, another model's at the commit. A second push completes it."""
    assert_rejected(facts["first push fails"], "Error while uploading 'model-0000", "Push again to complete it")
    assert_rejected(facts["failed push"], "somebody/whole: the Hub answered 507: The disk is full")
    assert facts["unchanged after it"]
    assert facts["branch"]["code"] == 0 and facts["branch"]["commits"]["somebody/whole"] == 1


def test_branch_and_tag(facts):
    """The model in one file under another license replaces the old shards and the old license."""
    assert facts["main unchanged"] and facts["tag is the branch"]
    assert set(facts["files of branch"]) == CODE | REST | {"model.safetensors", "extra.txt"} | (ADDED - {"LICENSE"})


def test_push_to_hub_of_model_and_processor(facts):
    """Two commits with everything but the recorded logits. An existing card is kept."""
    assert facts["own pushes"]["commits"] == 2
    ours, after = (ModelCard(text) for text in facts["cards"])
    assert ours.text == after.text and ours.data.to_dict() == after.data.to_dict()
    assert set(facts["files of parts"]) == CODE | REST | {"model.safetensors"}
    assert facts["shard sizes"] == [
        "5GB",
        "100KB",
        "5GB",
        "5GB",
    ]  # two saved folders, two pushes
    assert facts["push over parts"]["code"] == 0 and ModelCard(facts["card of parts"]).data.license == "mit"


def test_push_of_a_trainer(facts):
    """A complete repository without the recorded logits, with a card of the run."""
    assert {*facts["files of trained"]} - {"curves.png"} == CODE | REST | {"model.safetensors"}
    card = ModelCard(facts["card of trained"])
    assert CARD_MARK in card.text
    assert card.data.license == "mit" and card.data.datasets == ["somebody/images"]
    assert card.data.pipeline_tag == "image-text-to-text" and "|  |" not in card.text
    assert "| joint |" in card.text and "| max_steps | 1 |" in card.text and "(curves.png)" in card.text
    assert facts["trained"]["code"] == 0 and "OK, 1 warning\n  warning: vtlmm_check.json" in facts["trained"]["out"]


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_hub_strategies_publish_complete_repositories(facts, strategy):
    """No pickle, no token and no hidden file; the repository loads in a process without this package."""
    names = set(facts[f"files of {strategy}"])
    model = CODE | REST | {"model.safetensors"}
    folders = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-1", "checkpoint-2"]}
    expected = model | {f"{folder}/{name}" for folder in folders.get(strategy, []) for name in model}
    assert {name for name in names if not name.endswith("curves.png")} == expected
    assert not facts[f"secrets of {strategy}"]
    assert facts[f"verify {strategy}"]["code"] == 0, facts[f"verify {strategy}"]


def test_quantized_model(facts):
    """It loads by id and tag from a private repository, and only the decoder's projections are quantized."""
    pytest.importorskip("bitsandbytes")
    assert facts["nf4"]["code"] == 0 and facts["nf4"]["commits"]["somebody/nf4"] == 1
    assert facts["second nf4"]["code"] == 0 and facts["second nf4"]["commits"]["somebody/nf4"] == 0
    assert set(facts["files of nf4"]) == CODE | REST | {"model.safetensors"} | (ADDED - {"LICENSE"})
    types, projections = facts["types of nf4"], {n for n in facts["types of nf4"] if ".language_model.layers" in n}
    projections = {name for name in projections if "norm" not in name}
    assert len(projections) == 14 and {name for name in types if types[name] == "torch.uint8"} == projections
    assert {types[name] for name in types.keys() - projections} == {"torch.bfloat16"}
    data = ModelCard(facts["card of nf4"]).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == (["somebody/whole"], "quantized")
    assert "pip install bitsandbytes" in facts["card of nf4"] and "vtlmm export" not in facts["card of nf4"]
    assert facts["int8"]["code"] == 0 and "108,128 parameters: OK" in facts["int8"]["out"]
    assert_rejected(facts["tag again"], "The tag v4 already exists")
    assert_rejected(facts["no results"], "contains no results")
    assert_rejected(facts["read-only token"], "is read-only")
    assert facts["verify"]["code"] == 0
    assert " GB, 108,128 parameters: OK" in facts["verify"]["out"]


def test_gguf_files(facts):
    """Both files and the Modelfile, never into a repository that contains a model for transformers."""
    pytest.importorskip("gguf")
    assert facts["gguf"]["code"] == 0 and facts["gguf"]["commits"]["somebody/gguf"] == 1, facts["gguf"]
    assert facts["second gguf"]["code"] == 0 and facts["second gguf"]["commits"]["somebody/gguf"] == 0
    expected = {"model-f16.gguf", "mmproj-f16.gguf", "Modelfile", "README.md"}
    assert set(facts["files of gguf"]) == expected and facts["start of gguf"] == "GGUF"
    over_model = facts["gguf over model"]
    assert over_model["code"] == 1 and not any(over_model["commits"].values())
    assert "somebody/whole contains a model for transformers. Push GGUF files to a separate" in over_model["error"]
    card = ModelCard(facts["card of gguf"])
    assert card.data.library_name == "gguf" and card.data.license == "mit"
    assert 'hf_hub_download("somebody/gguf", "model-f16.gguf")' in card.text and "AutoModel" not in card.text
    assert "issue 25814" in card.text and "Visual tokens are training targets" not in card.text
    assert facts["verify gguf"]["code"] == 0 and "(gguf): 4 files" in facts["verify gguf"]["out"]


def test_handler_and_space(facts):
    """The second push of the same model changes neither repository. LLaVA has no page, GGUF files no handler."""
    assert facts["hosted"]["code"] == 0 and "/somebody/page/commit/" in facts["hosted"]["out"], facts["hosted"]
    assert facts["hosted"]["commits"]["somebody/hosted"] == facts["hosted"]["commits"]["somebody/page"] == 1
    assert not any(facts["second hosted"]["commits"].values()), facts["second hosted"]
    assert "handler.py" in facts["files of hosted"] and facts["private space"]
    header = yaml.safe_load(facts["space"]["README.md"].split("---")[1])
    assert (header["sdk"], header["app_file"], header["models"]) == ("gradio", "app.py", ["somebody/hosted"])
    assert facts["space"]["requirements.txt"].startswith("vtlmm[app]")
    assert 'MODEL = "somebody/hosted"' in facts["space"]["app.py"]
    assert_rejected(facts["space of llava"], "`space` shows visual tokens", "not llava")
    assert_rejected(facts["handler of gguf"], "`handler` needs a whole model for transformers, not gguf")
    assert_rejected(facts["invalid space"], "'page' is invalid")


def test_llava_export_of_a_merged_adapter(facts):
    """A push compares its logits with those recorded of the VT-LMM."""
    assert facts["merge"]["code"] == 0, facts["merge"]
    assert facts["llava"]["code"] == 0 and facts["llava"]["commits"]["somebody/llava"] == 1, facts["llava"]
    stock = {"model.safetensors", "preprocessor_config.json", "curves.png"}
    assert set(facts["files of llava"]) == REST | ADDED | stock
    assert "trust_remote_code" not in facts["card of llava"] and "(curves.png)" in facts["card of llava"]
    assert facts["push under a card"]["code"] == 0 and facts["card stays"]
    whole = set(facts["files of whole over adapter"])  # with adapter_config.json it would be loaded as an adapter
    assert facts["whole over adapter"]["code"] == 0
    assert "model.safetensors" in whole and not any("adapter" in name for name in whole)


def test_adapter(facts):
    """Pushed by its trainer, loaded by id, then pushed with `vtlmm push`. Its base must be on the Hub."""
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors", "vtlmm_adapter.json"}
    code = {"configuration_vtlmm.py", "processing_vtlmm.py"}
    assert {*facts["files of adapter"]} - {"curves.png"} == PROCESSOR | adapter | code
    torch.testing.assert_close(*map(torch.tensor, facts["logits of adapter"]))
    assert facts["adapter"]["code"] == 0
    data = ModelCard(facts["card of adapter"]).data
    assert data.library_name == "peft" and data.base_model == ["somebody/base"]
    assert data.to_dict()["base_model_relation"] == "adapter"
    local = facts["adapter of local"]
    assert local["code"] == 1 and "adapter_config.json: the base model '" in local["out"] and "Hub id" in local["out"]


def test_tokens_and_repositories(facts):
    assert_rejected(facts["wrong token"], "rejects your token")
    assert_rejected(facts["no token"], "No token", "hf auth login")
    assert_rejected(facts["no adapter"], "is not an adapter", "Leave out `form`")
    assert_rejected(facts["not ours"], "has no write access to another/model")
    assert_rejected(facts["missing"], "somebody/nothing does not exist on the Hub, or it is private")
    assert_rejected(facts["missing revision"], "somebody/whole has no branch, tag or commit 'v9'")
    assert_rejected(facts["missing to convert"], "somebody/nothing does not exist on the Hub")
    assert_rejected(facts["missing tower"], "somebody/nothing is not a local folder and is not a valid model")
    assert_rejected(facts["private to others"], "somebody/secret does not exist on the Hub, or it is private")


def test_without_a_hub(facts):
    assert_rejected(facts["push to no Hub"], "somebody/whole: the Hub cannot be reached", "Connection refused")
    reasons = "somebody/nothing: the Hub cannot be reached", "The local folder 'somebody/nothing' does not exist"
    assert_rejected(facts["verify without a Hub"], *reasons)
