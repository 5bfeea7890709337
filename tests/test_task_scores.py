# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Questions answered at evaluation steps: their scores, and that they do not change the training."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.tiny_models import WORDS, build_config, build_processor
from helpers.training import build_rows, build_trainer, weights, write_start
from PIL import Image as PILImage

from vtlmm.analysis.caption_words import measure_caption_words
from vtlmm.cli.main import main
from vtlmm.data.rows import load_rows
from vtlmm.evaluation.runner import task_scores
from vtlmm.evaluation.shuffled_images import with_shuffled_images
from vtlmm.hub.repository import RUN_RECORD
from vtlmm.inference.generation import answer_batch
from vtlmm.train.stage_runner import build_trainer as build_trainer_of_run


COLORS = ("red", "green", "blue", "white")


@pytest.fixture
def questions(tmp_path):
    """Three questions of different lengths about each of four images, and one without an image."""
    rows = [{"question": "say hello", "answer": "hello"}]
    for i, color in enumerate(COLORS):
        PILImage.new("RGB", (28, 28), color).save(tmp_path / f"{color}.png")
        for j in range(3):
            asked = " ".join(WORDS[3 + i : 5 + i + 2 * j])
            rows.append({"image": f"{color}.png", "question": asked, "answer": "boat"})
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(str(path))


@pytest.mark.parametrize(("num_images", "number"), [(3, 9), (9, 12)])
def test_scores_equal_those_of_single_questions(questions, tmp_path, num_images, number):
    """Of the questions about the first images only. Truths are what the model says to some, and the start of what it
    says to others, which is not enough."""
    model, processor = build_trainer(tmp_path).model, build_processor()
    model.generation_config.eos_token_id = list(range(2, 24))  # a random model would hardly ever stop
    model.generation_config.suppress_tokens = [
        0,
        1,
        *range(len(WORDS) + 4, 64),
    ]  # and generate tokens that are not words
    asked = [
        {"images": row["images"], "question": row["messages"][0]["content"][1]["text"]}
        for row in questions
        if row["images"]
    ][:number]
    texts, shuffled = (
        [answer_batch(model, processor, [question], max_new_tokens=64)[0] for question in side]
        for side in (asked, with_shuffled_images(asked))
    )
    starts = [text.rpartition(" ")[0] or "boat" for text in texts[2:5]]
    truths = iter([*texts[:2], *starts, *shuffled[5:]])

    def with_truth(row):
        row["messages"][1]["content"][0]["text"] = next(truths, "boat") if row["images"] else "hello"
        return row

    rows = Dataset.from_list([with_truth(row) for row in questions], features=questions.features)
    truths = [row["messages"][1]["content"][0]["text"] for row in rows if row["images"]][:number]
    expected = {
        name: sum(text == truth for text, truth in zip(side, truths, strict=True)) / number
        for name, side in (("accuracy", texts), ("accuracy_shuffled_images", shuffled))
    }
    assert 0 < expected["accuracy"] < 1 and 0 < expected["accuracy_shuffled_images"] < 1
    score = task_scores(rows, processor, num_images, batch_size=4)
    for training in (True, False):
        model.train(training)
        assert score(model) == pytest.approx(expected)
        assert model.training is training


def test_questions_without_images_are_rejected(questions):
    with pytest.raises(ValueError, match="No question about images"):
        task_scores(questions.select([0]), build_processor(), 2)


def test_invalid_rows_are_named_before_the_training(questions, tmp_path):
    rows = [{"question": "what </s>", "answer": "red", "image": "red.png"}]
    Path(tmp_path / "control.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="row 0: control token"):
        task_scores(load_rows(tmp_path / "control.json"), build_processor(), 2)
    config = build_config()
    config.text_config.max_position_embeddings = 16
    with pytest.raises(ValueError, match="row 3: too long"):
        task_scores(questions, build_processor(), 4, config=config)
    with pytest.raises(ValueError, match="`num_images` is 0"):
        task_scores(questions, build_processor(), 0)


def test_no_random_number_is_drawn(questions, tmp_path):
    trainer = build_trainer(tmp_path)
    score = task_scores(questions, build_processor(), 4, batch_size=3)

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    score(trainer.model)
    assert states() == before


def run(folder, **settings):
    trainer = build_trainer(
        folder,
        eval_dataset=build_rows(seed=1),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_train_batch_size=2,
        train_sampling_strategy="random",
        learning_rate=0.1,
        model_options={"text": "qwen2"},
        **settings,
    )
    for module in trainer.model.modules():  # a random number at each step
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    return trainer


@pytest.mark.slow
def test_scoring_does_not_change_the_training(questions, tmp_path):
    """The weights are equal bit by bit, with dropout and shuffled rows."""
    plain = run(tmp_path / "plain")
    plain.train()
    scored = run(tmp_path / "scored")
    scored.task_scores = task_scores(questions, build_processor(), 4, batch_size=3)
    scored.train()
    expected = weights(plain.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(scored.model).items())
    logged = [log for log in scored.state.log_history if "eval_loss" in log]
    assert len(logged) == 2 and all({"eval_accuracy", "eval_accuracy_shuffled_images"} <= log.keys() for log in logged)
    assert not any("eval_accuracy" in log for log in plain.state.log_history)


@pytest.mark.slow
def test_a_recipe_scores_its_questions_and_keeps_the_best(tmp_path, capsys):
    """Run `vtlmm train`; the run record has the final scores."""
    settings = write_start(tmp_path)
    rows = [{"image": "red.png", "question": "what is it", "answer": "red boat"}]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    settings |= {"eval_dataset": settings["dataset_name"], "eval_task_data": str(tmp_path / "questions.json")}
    settings |= {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 12, "eval_strategy": "steps"}
    settings |= {"eval_steps": 6, "save_strategy": "steps", "save_steps": 6, "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "eval_accuracy", "stage": "decoder"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings))  # JSON is YAML
    assert main(["train", "--config", str(recipe)]) == 0
    (record,) = json.loads((tmp_path / "out" / RUN_RECORD).read_text())
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    logged = [log["eval_accuracy"] for log in state["log_history"] if "eval_accuracy" in log]
    assert state["best_metric"] == max(logged) == record["metrics"]["eval_accuracy"] == 1.0
    assert "eval_accuracy_shuffled_images" not in record["metrics"]  # one image has no other
    # float32 adapter and head on a bfloat16 base, which needs autocast
    lora = "--use_peft --lora_r 2 --dtype bfloat16 --bf16 true --stage joint --output_dir".split()
    lora.append(str(tmp_path / "lora"))
    assert main(["train", "--config", str(recipe), *lora]) == 0
    assert main(["train", "--config", str(recipe), "--eval_task_images", "0"]) == 1
    assert "eval_task_images" in capsys.readouterr().err
    assert build_trainer_of_run(settings).evaluate()["eval_accuracy"] >= 0


@pytest.mark.slow
def test_caption_words_are_measured_at_evaluations(tmp_path):
    """The metrics are those of `measure_caption_words`, and the weights are those of a run without the callback."""
    settings = write_start(tmp_path)
    for color in COLORS:
        PILImage.new("RGB", (28, 28), color).save(tmp_path / f"{color}.png")
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps([{"image": f"{color}.png", "caption": f"a {color} boat"} for color in COLORS[:3]]))
    settings |= {"eval_dataset": settings["dataset_name"], "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    plain = build_trainer_of_run({**settings, "stage": "decoder", "output_dir": str(tmp_path / "plain")})
    plain.train()
    settings |= {"eval_caption_data": str(captions), "metric_for_best_model": "eval_patch_word"}
    measured = build_trainer_of_run({**settings, "stage": "decoder", "output_dir": str(tmp_path / "measured")})
    measured.train()
    expected = weights(plain.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(measured.model).items())
    words = measure_caption_words(measured.model.eval(), build_processor(), load_rows(captions))
    logged = [log for log in measured.state.log_history if "eval_image_word" in log]
    assert len(logged) == 2 and logged[-1]["eval_image_word"] == words.top_word.value
    assert logged[-1]["eval_patch_word_shuffled"] == words.patch_word_shuffled.value

    lora = {"use_peft": True, "lora_r": 2, "dtype": "bfloat16", "bf16": True, "output_dir": str(tmp_path / "lora")}
    assert "eval_patch_word" in build_trainer_of_run({**settings, **lora, "stage": "joint"}).evaluate()
    captions.write_text(json.dumps([{"image": "red.png", "caption": "a red boat"}]))
    with pytest.raises(ValueError, match="1 captioned images"):
        build_trainer_of_run(settings)
    with pytest.raises(FileNotFoundError, match="`eval_caption_data`: the file"):
        build_trainer_of_run({**settings, "eval_caption_data": "missing.json"})
