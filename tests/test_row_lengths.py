# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Rows are never truncated: `max_length` and the positions of the decoder limit them, before the training."""

import json

import pytest
from helpers.training import build_trainer, write_start

from vtlmm.train.stage_runner import build_trainer as build_run


def test_a_row_longer_than_max_length_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="Rows are never truncated"):
        build_trainer(tmp_path, max_length=5).train()


@pytest.fixture
def short(tmp_path):
    """The settings of a run whose decoder has 9 positions, fewer than its rows have tokens."""
    settings = write_start(tmp_path)
    file = tmp_path / "start/config.json"
    config = json.loads(file.read_text())
    config["text_config"]["max_position_embeddings"] = 9
    file.write_text(json.dumps(config))
    return {**settings, "stage": "joint"}


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [None, 2048])
def test_the_positions_of_the_decoder_limit_rows(short, max_length):
    trainer = build_run({**short, "max_length": max_length})
    with pytest.raises(ValueError, match="more than max_length=9 or the positions of the decoder"):
        trainer.train()


@pytest.mark.parametrize("streaming", [False, True])
def test_the_positions_of_the_decoder_limit_the_data_check(short, streaming):
    message = "too long" if streaming else "6 rows need 11 to 15 tokens, and the decoder has 9 positions"
    with pytest.raises(ValueError, match=message):
        build_run({**short, "check_data": True, "dataset_streaming": streaming}).train()


def test_lengths_are_padded_to_a_multiple(tmp_path):
    trainer = build_trainer(tmp_path, pad_to_multiple_of=64)
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] % 64 == 0
