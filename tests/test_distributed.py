# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Two processes on gloo (DDP and FSDP2) equal one process: updates, evaluation, saving, resuming."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from helpers.distributed_run import (
    EVALUATED,
    FSDP2,
    RAGGED,
    RESUMED,
    TEXT_ON_ONE,
    UPDATES,
    broken_rows,
    with_scored_questions,
)
from helpers.processes import environment
from helpers.tiny_models import build_processor
from helpers.training import assert_same_update, build_rows, build_trainer, update, weights
from helpers.vm_heads import build_search
from safetensors.torch import load_file

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.data.validation import check_rows
from vtlmm.train.parallelism import keep_exact_when_sharded
from vtlmm.train.vm_head_search import vm_heads


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Run all cases, and return their folder. One run of each kind is killed and resumed."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "helpers.distributed_run", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", UPDATES)
def test_two_processes_equal_one(folder, tmp_path, name):
    """Ragged images; no image at all in one process; a frozen head, a tied one, accumulation, an adapter; features
    that the processes computed together; rivals of the visual loss."""
    images, settings = UPDATES[name]
    settings = {**settings, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    settings.pop("cache_image_features", None)
    alone = build_trainer(tmp_path, build_rows(images), **settings)
    before = weights(alone.model)
    expected = update(alone)
    after = load_file(folder / f"{name}.safetensors")
    assert_same_update({key: after[key] - before[key] for key in expected}, expected)


def test_candidate_vm_heads_equal_those_of_one_process(folder, tmp_path):
    trainer = build_search(tmp_path)
    heads = vm_heads(trainer.model)
    trainer.train()
    found = load_file(folder / "ddp_heads.safetensors")
    prefixes = ["model.vm_head.", *(f"model.vm_head_candidates.{i}." for i in range(len(heads) - 1))]
    for prefix, head in zip(prefixes, heads, strict=True):
        for name, tensor in head.state_dict().items():
            torch.testing.assert_close(found[prefix + name], tensor, atol=1e-5, rtol=1e-4, msg=prefix + name)


def test_processes_share_the_work_of_a_feature_cache(folder):
    """Each process computes one half of the images, and no image twice."""
    files = [load_file(path) for path in (folder / "image_features").glob("*/*.safetensors")]
    assert sorted(map(len, files)) == [4, 5] and len({key for file in files for key in file}) == sum(RAGGED)


def test_processes_share_the_work_of_a_data_check(folder):
    expected = asdict(check_rows(broken_rows(), build_processor(), max_length=30))
    assert [problem["row"] for problem in expected["problems"] if problem["kind"] == "image count"] == [3]
    for rank in range(2):
        assert json.loads((folder / f"ddp_checked_{rank}.json").read_text()) == expected


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_counts_every_row_once(folder, tmp_path, name):
    """Seven rows in batches of two: accelerate repeats one row. Only one process has images."""
    rows, stage = build_rows(TEXT_ON_ONE[:7]), "decoder" if name.endswith("decoder") else "joint"
    trainer = build_trainer(tmp_path, rows, stage=stage, per_device_eval_batch_size=7)
    alone = (with_scored_questions(trainer) if name.startswith("ddp") else trainer).evaluate(rows)
    found = json.loads((folder / f"{name}.json").read_text())
    metrics = ["eval_loss", "eval_lm_loss"]
    if stage == "joint":
        metrics += ["eval_visual_loss", "eval_visual_token_entropy", "eval_head_agreement"]
    if name.startswith("ddp"):  # of the questions about the model's images each process answers its share
        metrics += ["eval_accuracy", "eval_accuracy_shuffled_images"]
        assert 0 < alone["eval_accuracy"] < 1
    for metric in metrics:
        assert found[metric] == pytest.approx(alone[metric], rel=1e-5), metric


def test_sums_stay_float32_in_a_sharded_bfloat16_run(folder):
    dtypes = json.loads((folder / "fsdp_bf16.json").read_text())
    assert dtypes.pop("num_lm_targets") == dtypes.pop("num_visual_targets") == "torch.int64"
    assert set(dtypes.values()) == {"torch.float32"}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_killed_and_resumed_equals_uninterrupted(folder, kind):
    """Two processes are killed after step 3 of 6, and resume from the checkpoint of step 2."""
    whole, resumed = (load_file(folder / f"{kind}_{name}.safetensors") for name in ("whole", "killed_resumed"))
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def test_a_sharded_run_saves_a_complete_model(folder):
    checkpoint = folder / "fsdp_whole" / f"checkpoint-{RESUMED['max_steps']}"
    assert {"modeling_vtlmm.py", "fused_losses_vtlmm.py"} <= {path.name for path in checkpoint.iterdir()}
    loaded, expected = (
        weights(VTLMMForConditionalGeneration.from_pretrained(checkpoint)),
        load_file(folder / "fsdp_whole.safetensors"),
    )
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_fsdp_1_is_rejected(tmp_path, monkeypatch):
    trainer = build_trainer(tmp_path)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    with pytest.raises(ValueError, match="Set fsdp_version: 2"):
        keep_exact_when_sharded(trainer, trainer.model)


@pytest.mark.parametrize("path", sorted(FSDP2.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_key_of_the_recipes(path):
    """accelerate rejects unknown keys at the top level, but does not check nested keys."""
    config = ClusterConfig.from_yaml_file(path)
    known = vars(launch_command_parser().parse_args(["train.py"]))
    assert {*config.fsdp_config, *config.deepspeed_config} <= known.keys()
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds[path.stem]
    assert config.deepspeed_config.get("zero_stage") == {"zero2": 2, "zero3": 3}.get(path.stem)
    assert config.mixed_precision == "no", "the recipe's bf16 decides"
