# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`log_patch_words`: an image of the patch words at every evaluation, as a file and in the trackers."""

import sys
import types

import numpy as np
import pytest
import torch
from helpers.training import build_rows, build_trainer, weights
from PIL import Image

from vtlmm.train.config import VTLMMTrainingConfig
from vtlmm.train.patch_word_images import TRACKER_KEY, PatchWordImages, log_image


pytest.importorskip("matplotlib")
EVALUATIONS = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "learning_rate": 0.1}


@pytest.fixture
def tracker():
    """Return a stand-in for W&B or Trackio that keeps what is logged."""
    module, logged = types.ModuleType("tracker"), []
    module.Image = lambda path, caption: (path, caption)
    module.log = logged.append
    module.logged = logged
    return module


@pytest.mark.slow
def test_images_are_written_at_every_evaluation(tmp_path):
    """The images come from the evaluation rows, and the training is the same as without them."""
    runs, modes = {}, {}
    for number in (0, 2):
        rows = build_rows((0, 1, 2), seed=1)
        trainer = build_trainer(tmp_path / str(number), eval_dataset=rows, log_patch_words=number, **EVALUATIONS)
        trainer.train()
        runs[number], modes[number] = weights(trainer.model), trainer.model.training
    assert modes[0] == modes[2]
    assert all(torch.equal(tensor, runs[2][name]) for name, tensor in runs[0].items())
    assert not (tmp_path / "0" / "patch_words").exists()
    files = sorted((tmp_path / "2" / "patch_words").iterdir())
    assert [file.name for file in files] == ["step_000001.png", "step_000002.png"]
    first, second = (np.asarray(Image.open(file).convert("L"), dtype=float) for file in files)
    assert first.shape == second.shape and np.abs(first - second).max() > 50  # other words, or another entropy
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, PatchWordImages))
    expected = [image for row in rows for image in row["images"]][:2]
    assert [image.tobytes() for image in callback.images] == [image.convert("RGB").tobytes() for image in expected]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_images_are_logged_to_trackers_of_the_run(tmp_path, monkeypatch, tracker, name):
    monkeypatch.setitem(sys.modules, name, tracker)
    trainer = build_trainer(tmp_path)
    path = tmp_path / "words.png"
    log_image(trainer, path, 7, "caption")
    assert tracker.logged == []  # the run does not report to it
    trainer.args.report_to = [name]
    log_image(trainer, path, 7, "caption")
    assert tracker.logged == [{TRACKER_KEY: (str(path), "caption"), "train/global_step": 7}]


def test_images_are_in_the_event_files_of_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"log_patch_words": 1, "report_to": "tensorboard", **EVALUATIONS}
    build_trainer(tmp_path, eval_dataset=build_rows((1,), seed=1), **settings).train()
    [events] = tmp_path.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    images = read.Images(TRACKER_KEY)
    assert [image.step for image in images] == [1, 2]
    for image, file in zip(images, sorted((tmp_path / "patch_words").iterdir()), strict=True):
        assert (image.width, image.height) == Image.open(file).size


def test_images_need_evaluation_rows_with_images(tmp_path):
    for rows in (None, build_rows((0, 0), seed=1)):
        with pytest.raises(ValueError, match="`log_patch_words` shows images of `eval_dataset`, but it has none"):
            build_trainer(tmp_path, eval_dataset=rows, log_patch_words=1)
    with pytest.raises(ValueError, match="log_patch_words"):
        VTLMMTrainingConfig(str(tmp_path), log_patch_words=-1)
    candidates = [{"vm_head_type": "linear"}, {"vm_head_type": "attention"}]
    with pytest.raises(ValueError, match="shows one VM head"):
        VTLMMTrainingConfig(str(tmp_path), stage="visual_head", vm_head_candidates=candidates, log_patch_words=1)
