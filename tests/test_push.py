# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Pushing to a Hub on loopback with the unmodified client, by the commands; hub_session.py is what was done there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard


CODE = {f"{n}_vtlmm.py" for n in ("configuration", "modeling", "processing", "layers", "losses", "outputs")}
CODE |= {"fused_losses_vtlmm.py"}
REST = {"chat_template.jinja", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json"}
REST |= {"tokenizer_config.json", "README.md"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}


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
    assert facts["incomplete"]["code"] == 1 and "no `license`" in facts["incomplete"]["out"]
    assert facts["dry run"]["code"] == 0 and "model-00001-of-00002.safetensors" in facts["dry run"]["out"]
    assert not facts["writes of both"]


def test_a_push_is_one_commit_with_everything_and_the_second_is_none(facts):
    assert facts["push"]["code"] == 0 and facts["push"]["commits"] == {"somebody/whole": 1}
    assert set(facts["files"]) == CODE | REST | SHARDS | {"vtlmm_check.json"} and facts["private"]
    assert facts["second push"]["code"] == 0 and facts["second push"]["commits"] == {"somebody/whole": 0}


def test_a_push_that_fails_in_the_middle(facts):
    """The first in a shard, that of another model at its commit: the old one stays; a second push makes it whole."""
    assert_refused(facts["first push fails"], "Error while uploading 'model-0000", "Push again to complete it")
    assert_refused(facts["failed push"], "somebody/whole: the Hub answered 507: The disk is full")
    assert facts["unchanged after it"]
    assert facts["branch"]["code"] == 0 and facts["branch"]["commits"]["somebody/whole"] == 1


def test_a_branch_and_a_tag(facts):
    """Of a model in one file: the shards of the one before are not left beside it."""
    assert facts["main unchanged"] and facts["tag is the branch"]
    assert set(facts["files of branch"]) == CODE | REST | {"model.safetensors", "vtlmm_check.json"}


def test_model_and_processor_push_themselves(facts):
    """Two commits with everything but the recorded logits; the card that is there stays, of theirs ours takes over."""
    assert facts["own pushes"]["commits"] == 2
    ours, after = (ModelCard(text) for text in facts["cards"])
    assert ours.text == after.text and ours.data.to_dict() == after.data.to_dict()
    assert set(facts["files of parts"]) == CODE | REST | {"model.safetensors"}
    assert facts["shard sizes"] == ["100KB", "5GB", "5GB"]  # one that was asked for, and two pushes
    assert facts["push over parts"]["code"] == 0 and ModelCard(facts["card of parts"]).data.license == "mit"


def test_loads_by_id_in_a_process_without_this_package(facts):
    """A private repository at a tag: by every Auto class and the pipeline, with the recorded logits."""
    assert_refused(facts["verify without trust"], "runs the code in it", "--trust-remote-code")
    assert facts["verify"]["code"] == 0 and "16 files" in facts["verify"]["out"]


def test_the_twin(facts):
    """It gave the logits that were recorded of the VT-LMM, or it would not have been pushed."""
    assert facts["twin"]["code"] == 0 and facts["twin"]["commits"]["somebody/twin"] == 1
    assert set(facts["files of twin"]) == REST | {"model.safetensors", "preprocessor_config.json", "vtlmm_check.json"}
    assert "trust_remote_code" not in facts["card of twin"]
    assert facts["push under a card"]["code"] == 0 and facts["card stays"]


def test_an_adapter_needs_a_base_that_others_have(facts):
    local = facts["adapter of local"]
    assert local["code"] == 1 and "adapter_config.json: the base is '" in local["out"] and "Hub id" in local["out"]
    assert facts["adapter of whole"]["code"] == 0
    data = ModelCard(facts["card of adapter"]).data
    assert data.library_name == "peft" and data.base_model == ["somebody/whole"]
    assert data.to_dict()["base_model_relation"] == "adapter"


def test_tokens_and_repositories(facts):
    assert_refused(facts["wrong token"], "does not know your token")
    assert_refused(facts["no token"], "There is no token", "hf auth login")
    assert_refused(facts["not ours"], "may not write to another/model")
    assert_refused(facts["missing"], "somebody/nothing is not on the Hub, or it is private")
    assert_refused(facts["missing revision"], "somebody/whole has no branch, tag or commit 'v9'")
