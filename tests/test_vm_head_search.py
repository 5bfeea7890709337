# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The search over VM heads in stage III: each head trains as it would alone, and the best one is kept."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.training import build_rows, build_trainer, weights
from helpers.vm_heads import CANDIDATES, SETTINGS, build_search

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.hub.repository import RUN_RECORD
from vtlmm.train.config import VTLMMTrainingConfig
from vtlmm.train.run_record import write_record
from vtlmm.train.stages import describe
from vtlmm.train.vm_head_search import vm_heads


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a trainer after the search, its trained heads and their initial weights."""
    trainer = build_search(tmp_path_factory.mktemp("heads"))
    heads = vm_heads(trainer.model)
    start = copy.deepcopy([head.state_dict() for head in heads])
    trainer.train()
    return trainer, heads, start


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CANDIDATES)))
def test_candidate_trains_as_it_would_alone(trained, tmp_path, number):
    """The same rows, its own learning rate, clipping and weight decay."""
    trainer, heads, start = trained
    candidate = CANDIDATES[number]
    options = {"vm_head_type": candidate.get("vm_head_type", "linear")}
    settings = {**SETTINGS, "learning_rate": candidate.get("learning_rate", SETTINGS["learning_rate"])}
    alone = build_trainer(tmp_path, model_options=options, **settings)
    # The random numbers for the decoder depend on the type of the head, so copy all other weights.
    others = {name: tensor for name, tensor in weights(trainer.model).items() if "vm_head" not in name}
    alone.model.load_state_dict(others, strict=False)
    alone.model.model.vm_head.load_state_dict(start[number])
    alone.train()
    moved = 0.0
    for name, tensor in alone.model.model.vm_head.state_dict().items():
        torch.testing.assert_close(heads[number].state_dict()[name], tensor, atol=1e-6, rtol=0)
        moved += (tensor - start[number][name]).abs().max()
    assert moved > 1e-4


def test_best_head_is_kept(trained, tmp_path, capsys):
    trainer, heads, _ = trained
    losses = [row["eval_visual_loss"] for row in trainer.vm_head_table]
    best = losses.index(min(losses))
    assert [row["kept"] for row in trainer.vm_head_table].index(True) == best and len(set(losses)) == len(losses)
    assert trainer.model.model.vm_head is heads[best] and not hasattr(trainer.model.model, "vm_head_candidates")
    evaluated = trainer.evaluate()
    assert evaluated["eval_visual_loss"] == pytest.approx(losses[best], rel=1e-6)
    trainer.save_model(str(tmp_path))
    loaded = VTLMMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.vm_head_type == trainer.vm_head_table[best]["vm_head_type"]
    for (name, a), b in zip(weights(trainer.model).items(), weights(loaded).values(), strict=True):
        assert torch.equal(a, b), name
    write_record(trainer, {"model_name_or_path": "none"}, evaluated, 1.0)
    (record,) = json.loads(Path(trainer.args.output_dir, RUN_RECORD).read_text())
    assert record["vm_heads"] == trainer.vm_head_table
    assert trainer.vm_head_table[2] == {
        "vm_head_type": "attention",
        "vm_head_init": "input_embeddings",
        "learning_rate": 2e-2,
        "eval_visual_loss": losses[2],
        "kept": best == 2,
    }


def test_heads_start_with_their_initialization(tmp_path):
    model = build_search(tmp_path).model
    heads = vm_heads(model)
    words = model.config.visual_vocab_size
    assert (
        torch.equal(heads[1].weight, model.lm_head.weight[:words])
        and heads[1].residual_block.output.weight.abs().max() == 0
    )
    assert torch.equal(heads[2].weight, model.get_input_embeddings().weight[:words])
    assert heads[1].residual_block.input.weight.abs().max() > 0 and not torch.equal(heads[0].weight, heads[3].weight)


@pytest.mark.slow
def test_resumed_run_keeps_the_same_head(trained, tmp_path):
    """Resume from step 2 after the later checkpoint is deleted."""
    trainer, heads, _ = trained
    saving = {"save_strategy": "steps", "save_steps": 2}
    build_search(tmp_path, **saving).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = build_search(tmp_path, **saving)
    found = vm_heads(resumed.model)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and resumed.vm_head_table == trainer.vm_head_table
    for head, expected in zip(found, heads, strict=True):
        for name, tensor in expected.state_dict().items():
            assert torch.equal(head.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([{}], "two candidates or more"),
        ([{}, {"vm_head_type": "cnn"}], "`vm_head_type` of candidate 1 is 'cnn'; it must be linear, mlp, attention"),
        ([{"lr": 1e-3}, {}], "Candidate 0 of `vm_head_candidates` has the unknown key 'lr'"),
    ],
)
def test_invalid_candidates_are_rejected(tmp_path, candidates, message):
    with pytest.raises(ValueError, match=message):
        VTLMMTrainingConfig(output_dir=str(tmp_path), use_cpu=True, stage="visual_head", vm_head_candidates=candidates)


def test_candidates_need_stage_iii_and_held_out_rows(tmp_path):
    with pytest.raises(ValueError, match="needs a stage that trains only the VM head"):
        VTLMMTrainingConfig(output_dir=str(tmp_path), use_cpu=True, stage="joint", vm_head_candidates=CANDIDATES)
    with pytest.raises(ValueError, match="one `eval_dataset`"):
        build_trainer(tmp_path, stage="visual_head", vm_head_candidates=CANDIDATES)


def test_settings_of_candidates(tmp_path):
    """A learning rate given as a string, a default initialization, and a second training without candidates."""
    candidates = [{"learning_rate": "1e-3"}, {"vm_head_init": "input_embeddings"}]
    settings = {**SETTINGS, "max_steps": 1, "vm_head_init": "random"}
    rows = build_rows((1, 1, 0, 2), seed=1)
    trainer = build_trainer(tmp_path, eval_dataset=rows, vm_head_candidates=candidates, **settings)
    assert [c["vm_head_init"] for c in trainer.vm_head_candidates] == ["random", "input_embeddings"]
    first, second = (head.weight.detach().clone() for head in vm_heads(trainer.model))
    model, size = trainer.model, first.shape[0]
    assert not torch.equal(first, model.lm_head.weight[:size])
    assert torch.equal(second, model.get_input_embeddings().weight[:size])
    text = describe(model, trainer.stage)
    assert f"{2 * first.numel():,} trainable" in text
    trainer.train()
    assert len(trainer.vm_head_table) == 2
    trainer.train()
