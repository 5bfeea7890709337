# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Run two steps of every command in recipes/README.md, with tiny models of the same kind."""

import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers.training import write_start

from vtlmm.train.recipe import parse_arguments
from vtlmm.train.stage_runner import build_trainer
from vtlmm.train.stage_settings import split_stages
from vtlmm.train.stages import module_of


FOLDER = Path(__file__).parents[1] / "recipes"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
BLOCKS = [block.splitlines() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)]


def training_runs(command: str) -> list[dict]:
    """Return the settings of each run of a command; an empty list for other commands."""
    words = shlex.split(command)
    if "train" not in words:
        return []
    arguments = [str(FOLDER.parent / word) if word.startswith("recipes/") else word for word in words]
    return split_stages(parse_arguments(arguments[words.index("train") + 1 :]))


def recipe_of(command: str) -> str:
    return re.search(r"--config recipes/(\w+)\.yaml", command).group(1)


RUNS = [(recipe_of(command), run) for block in BLOCKS for command in block for run in training_runs(command)]


def on_a_cpu(settings: dict) -> dict:
    """Replace settings that need a GPU or take long."""
    changes = {"use_cpu": True}  # bfloat16 and 4 bits work on a CPU
    if "paged" in settings.get("optim", ""):
        changes["optim"] = "adamw_torch"  # needs CUDA
    changes["dataloader_num_workers"] = 0  # processes cost more than the steps
    return {**settings, **changes}


def test_every_recipe_has_its_commands():
    assert {recipe for recipe, _ in RUNS} == {path.stem for path in FOLDER.glob("*.yaml")}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: recipe_of(block[1]))
def test_commands_follow_each_other_through_their_folders(block):
    made = set()
    for command in block:
        words = shlex.split(command)
        steps = [(run["model_name_or_path"], run["output_dir"]) for run in training_runs(command)]
        steps = steps or [(words[2] if words[1] == "merge" else None, words[words.index("--output") + 1])]
        for start, output in steps:
            assert start is None or start in made, command
            made.add(output)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Llama behind a CLIP, and for the small decoder a tied Qwen2 behind a SigLIP; and rows."""
    large = write_start(tmp_path_factory.mktemp("large"))
    small = write_start(tmp_path_factory.mktemp("small"), "qwen2", "siglip_vision_model")
    return {"large": large, "small": small}


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "settings"), RUNS, ids=[f"{recipe}-{run['stage']}" for recipe, run in RUNS])
def test_two_steps(tiny, tmp_path, recipe, settings):
    """Exactly the modules of the stage change, in float32."""
    if settings.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    start = tiny["small" if recipe == "small_decoder" else "large"]
    data = {name: start[name] for name in ("model_name_or_path", "dataset_name", "image_folder")}
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    changes = {**data, **quiet, "output_dir": str(tmp_path), "max_steps": 2, "warmup_steps": 0}
    trainer = build_trainer({**on_a_cpu(settings), **changes})
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2 and math.isfinite(trainer.state.log_history[0]["loss"])
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert {before[name].dtype for name in moved} == {torch.float32}
    expected = set(trainer.stage.trains)
    if trainer.model.config.tie_word_embeddings:
        expected -= {"lm_head"}  # the matrix is counted as the decoder's
    assert {module_of(name) for name in moved} == expected
