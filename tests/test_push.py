# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Pushing to a Hub on loopback with the unmodified client, by the commands; hub_session.py is what was done there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from vtlmm.hub.model_card import CARD_MARK


CODE = {f"{n}_vtlmm.py" for n in ("configuration", "modeling", "processing", "layers", "losses", "outputs")}
CODE |= {"fused_losses_vtlmm.py"}
REST = {"chat_template.jinja", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json"}
REST |= {"tokenizer_config.json", "README.md"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}


ADDED = {"README.md", "LICENSE", "vtlmm_check.json"}
PROCESSOR = {"chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    """What happened in the session: by name exit code, what was said, and commits of each repository."""
    work = tmp_path_factory.mktemp("session")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("hub_session.py")), str(work)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=work)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.split("FACTS")[-1])


def assert_refused(fact: dict, *words: str):
    """One line on stderr, exit code 1, no commit."""
    assert fact["code"] == 1 and fact["error"].count("\n") == 1 and not any(fact["commits"].values())
    assert all(word in fact["error"] for word in words), fact["error"]


def test_nothing_is_pushed_that_does_not_verify(facts):
    assert_refused(facts["incomplete"], "under which license")  # before anything is computed
    assert facts["incomplete"]["out"] == ""
    assert facts["dry run"]["code"] == 0 and "model-00001-of-00002.safetensors" in facts["dry run"]["out"]
    assert not facts["writes of both"]


def test_a_push_is_one_commit_with_everything_and_the_second_is_none(facts):
    assert facts["push"]["code"] == 0 and facts["push"]["commits"] == {"somebody/whole": 1}
    assert set(facts["files"]) == CODE | REST | SHARDS | ADDED and facts["private"]
    assert facts["second push"]["code"] == 0 and facts["second push"]["commits"] == {"somebody/whole": 0}


def test_a_push_that_fails_in_the_middle(facts):
    """The first in a shard, that of another model at its commit: the old one stays; a second push makes it whole."""
    assert_refused(facts["first push fails"], "Error while uploading 'model-0000", "Push again to complete it")
    assert_refused(facts["failed push"], "somebody/whole: the Hub answered 507: The disk is full")
    assert facts["unchanged after it"]
    assert facts["branch"]["code"] == 0 and facts["branch"]["commits"]["somebody/whole"] == 1


def test_a_branch_and_a_tag(facts):
    """Of a model in one file under another license: the old shards and license are not left beside it."""
    assert facts["main unchanged"] and facts["tag is the branch"]
    assert set(facts["files of branch"]) == CODE | REST | {"model.safetensors"} | (ADDED - {"LICENSE"})


def test_model_and_processor_push_themselves(facts):
    """Two commits with everything but the recorded logits; the card that is there stays, of theirs ours takes over."""
    assert facts["own pushes"]["commits"] == 2
    ours, after = (ModelCard(text) for text in facts["cards"])
    assert ours.text == after.text and ours.data.to_dict() == after.data.to_dict()
    assert set(facts["files of parts"]) == CODE | REST | {"model.safetensors"}
    assert facts["shard sizes"] == ["5GB", "100KB", "5GB", "5GB"]  # two that were saved, one as asked for; two pushes
    assert facts["push over parts"]["code"] == 0 and ModelCard(facts["card of parts"]).data.license == "mit"


def test_the_push_of_a_trainer(facts):
    """Everything but the recorded logits, no pickle, and a card from the run, which `vtlmm push` completes."""
    assert set(facts["files of trained"]) == CODE | REST | {"model.safetensors"}
    card = ModelCard(facts["card of trained"])
    assert CARD_MARK in card.text
    assert card.data.license == "mit" and card.data.datasets == ["somebody/images"]
    assert card.data.pipeline_tag == "image-text-to-text" and "| `learning_rate` | 0.01 |" in card.text
    assert "after 1 optimizer steps" in card.text and "lm_loss" in card.text and "vm_head teaches" in card.text
    assert facts["trained"]["code"] == 1 and "2 problems\n  vtlmm_check.json: no recorded" in facts["trained"]["out"]


def test_the_decoder_in_4_bits(facts):
    """By id and tag out of a private repository, in a process without this package: by every Auto class and the
    pipeline, with the recorded logits. Only what training rounds too is rounded."""
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
    assert "pip install bitsandbytes" in facts["card of nf4"] and "convert" not in facts["card of nf4"]
    assert facts["int8"]["code"] == 0 and "108,128 parameters: complete" in facts["int8"]["out"]
    assert_refused(facts["tag again"], "has a tag v4 already")
    assert_refused(facts["no results"], "holds no results")
    assert_refused(facts["read-only token"], "may read only")
    assert_refused(facts["verify without trust"], "runs the code in it", "--trust-remote-code")
    assert facts["verify"]["code"] == 0
    assert "16 files, 0.0002" in facts["verify"]["out"] and " GB, 108,128 parameters" in facts["verify"]["out"]


def test_the_twin_of_a_merged_adapter(facts):
    """It gave the logits that were recorded of the VT-LMM, or it would not have been pushed."""
    assert facts["merge"]["code"] == 0
    assert facts["twin"]["code"] == 0 and facts["twin"]["commits"]["somebody/twin"] == 1
    stock = {"model.safetensors", "preprocessor_config.json", "curves.png"}
    assert set(facts["files of twin"]) == REST | ADDED | stock
    assert "trust_remote_code" not in facts["card of twin"] and "(curves.png)" in facts["card of twin"]
    assert facts["push under a card"]["code"] == 0 and facts["card stays"]
    whole = set(facts["files of whole over adapter"])  # with one of an adapter's it would be loaded as one
    assert facts["whole over adapter"]["code"] == 0
    assert "model.safetensors" in whole and not any(name.startswith("adapter_") for name in whole)


def test_an_adapter(facts):
    """Pushed by its trainer, loaded by id, then with a longer card. It needs a base that others have."""
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    code = {"configuration_vtlmm.py", "processing_vtlmm.py"}
    assert set(facts["files of adapter"]) == PROCESSOR | adapter | code
    torch.testing.assert_close(*map(torch.tensor, facts["logits of adapter"]))
    assert facts["adapter"]["code"] == 0
    data = ModelCard(facts["card of adapter"]).data
    assert data.library_name == "peft" and data.base_model == ["somebody/base"]
    assert data.to_dict()["base_model_relation"] == "adapter"
    local = facts["adapter of local"]
    assert local["code"] == 1 and "adapter_config.json: the base is '" in local["out"] and "Hub id" in local["out"]


def test_tokens_and_repositories(facts):
    assert_refused(facts["wrong token"], "does not know your token")
    assert_refused(facts["no token"], "There is no token", "hf auth login")
    assert_refused(facts["no adapter"], "model is no adapter", "without `--adapter`")
    assert_refused(facts["not ours"], "may not write to another/model")
    assert_refused(facts["missing"], "somebody/nothing is not on the Hub, or it is private")
    assert_refused(facts["missing revision"], "somebody/whole has no branch, tag or commit 'v9'")
    assert_refused(facts["missing to convert"], "convert: somebody/nothing is not on the Hub")
    assert_refused(facts["missing tower"], "compose: somebody/nothing is not a local folder and is not a valid model")
    assert_refused(facts["private to others"], "convert: somebody/secret is not on the Hub, or it is private")


def test_no_hub(facts):
    assert_refused(facts["push to no Hub"], "somebody/whole: the Hub cannot be reached", "Connection refused")
    reasons = "somebody/nothing: the Hub cannot be reached", "There is no folder somebody/nothing here"
    assert_refused(facts["verify without a Hub"], *reasons)
