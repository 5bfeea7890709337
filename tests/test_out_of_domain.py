# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Out-of-distribution images: metrics with known results, the probability of an answer, and a whole grid."""

import json
import random

import numpy as np
import pytest
import torch
from helpers.ablation import rows_of, work, write_grid  # noqa: F401 - `work` is a fixture
from helpers.tiny_models import build_processor
from PIL import Image as PILImage

from modeling_vtlmm import VTLMMForConditionalGeneration
from vtlmm.ablations.grid import EvaluateConfig
from vtlmm.ablations.metrics import Evaluator, read_held_out_data
from vtlmm.ablations.ood import format_ood, summarize_ood
from vtlmm.ablations.presence_questions import presence_questions
from vtlmm.analysis.ood_metrics import detection_auroc
from vtlmm.cli.main import main
from vtlmm.data.rows import load_rows
from vtlmm.evaluation.calibration import calibration, calibration_error


# ---- Known results ----


def test_calibrated_answers_have_zero_error():
    """The accuracy of each of ten bins equals its probability: 5 of 100 at 0.05, … 95 of 100 at 0.95."""
    probabilities = np.repeat(np.arange(0.05, 1, 0.1), 100)
    correct = np.concatenate([np.arange(100) < round(100 * p) for p in np.arange(0.05, 1, 0.1)])
    estimate = calibration_error(probabilities, correct, range(1000))
    assert estimate.value == pytest.approx(0, abs=1e-9)
    assert 0 < estimate.low < estimate.high < 0.06  # the sampling error of 1,000 answers


def test_calibration_error_by_hand():
    """Confident wrong answers give 1. Two bins of different size: (3 · |1 − 0.95| + 1 · |0 − 0.45|) / 4."""
    assert calibration_error([1.0, 1.0], [0, 0], ["a", "b"]).value == 1
    estimate = calibration_error([0.95, 0.95, 0.95, 0.45], [1, 1, 1, 0], ["a", "a", "b", "b"])
    assert estimate.value == pytest.approx((3 * 0.05 + 0.45) / 4)
    assert estimate.n == 2
    # a draw is a twice, both once, or b twice
    assert (estimate.low, estimate.high) == pytest.approx((0.05, (0.05 + 0.45) / 2))


def test_bins_of_a_reliability_diagram():
    found = calibration([1.0, 0.95, 0.93, 0.45], [1, 1, 0, 0.5], ["a", "a", "b", "b"])
    low, high = found["bins"]
    assert (low["n"], low["probability"], low["score"]) == (1, 0.45, 0.5) and low["low"] < 0.5 < low["high"]
    assert (high["n"], high["score"]) == (3, pytest.approx(2 / 3)) and high["probability"] == pytest.approx(0.96)
    assert found["error"] == pytest.approx((2.88 - 2 + 0.05) / 4)


def test_calibration_interval_equals_image_bootstrap():
    """Compare with a second implementation that draws images and recomputes the error from their answers."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(30), 3)
    probabilities = rng.random(90)
    correct = (rng.random(90) < 0.6).astype(float)

    def error(rows):
        bins = (probabilities[rows] * 10).astype(int)
        gaps = [(correct[rows] - probabilities[rows])[bins == b].sum() for b in range(10)]
        return np.abs(gaps).sum() / len(rows)

    draws = []
    for _ in range(4000):
        images = rng.integers(30, size=30)
        draws.append(error(np.concatenate([np.flatnonzero(clusters == image) for image in images])))
    estimate = calibration_error(probabilities, correct, clusters)
    assert estimate.value == pytest.approx(error(np.arange(90)))
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.012)


def test_auroc_of_equal_sets_is_chance():
    scores = np.random.default_rng(0).random(50)
    estimate = detection_auroc(scores, scores)
    assert estimate.value == pytest.approx(0.5) and estimate.low < 0.5 < estimate.high
    assert detection_auroc([1.0] * 5, [1.0] * 7).value == 0.5  # ties count half
    apart = detection_auroc([1.0, 2.0], [3.0, 4.0, 5.0])
    assert (apart.value, apart.low, apart.high, apart.n) == (1, 1, 1, 5)
    assert detection_auroc([3.0, 4.0], [1.0]).value == 0


def test_detection_interval_covers():
    """The interval covers the known AUROC Φ(1/√2) = 0.7602 in about 95 % of 200 pairs of normal samples."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        estimate = detection_auroc(rng.normal(size=40), rng.normal(1, size=60), num_draws=400)
        covered += estimate.low <= 0.7602 <= estimate.high
    assert 180 <= covered <= 199


# ---- Questions and answers ----


def test_presence_questions_from_labels(shared, tmp_path):
    """The numbers of blood cell images with each label were counted in the file."""
    words = {"WBC": "white blood cell", "Platelets": "platelet"}
    rows = presence_questions(str(shared / "data/bccd/bccd.parquet"), "objects", words)
    assert rows[0]["questions"] == ["is there a white blood cell in the image?", "is there a platelet in the image?"]
    answers = np.array(rows["answers"][:])
    assert (len(answers), *(answers == "yes").sum(0)) == (364, 358, 201)
    rows.to_parquet(tmp_path / "cells.parquet")
    loaded = load_rows(str(tmp_path / "cells.parquet"))
    assert [m["content"][-1]["text"] for m in loaded[3]["messages"]][1::2] == rows[3]["answers"]
    assert loaded[3]["images"][0].size == rows[3]["image"].size
    with pytest.raises(ValueError, match=r"has the labels \['wbc'\]. Use some of \['Platelets', 'RBC', 'WBC'\]"):
        presence_questions(str(shared / "data/bccd/bccd.parquet"), "objects", {"wbc": "cell"})
    with pytest.raises(ValueError, match="has the columns .* It needs `image` and 'labels'"):
        presence_questions(str(shared / "data/bccd/bccd.parquet"), "labels", words)


@torch.no_grad()
def test_probability_of_an_answer_by_hand(work, tmp_path):  # noqa: F811
    """Compare the padded batch with one forward pass over each question and its answer."""
    config = EvaluateConfig(dataset=str(work / "test.json"), batch_size=4, max_new_tokens=4)
    processor, model = build_processor(), VTLMMForConditionalGeneration.from_pretrained(work / "start")
    held_out = read_held_out_data(config, processor).held_out
    evaluator = Evaluator(model, processor, config, tmp_path)
    answers = evaluator.answer(held_out.questions, evaluator.vision_features(held_out))
    lengths = set()
    for question, answer in zip(held_out.questions, answers, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question["question"]}]
        row, place = held_out.image_positions[question["images"][0]]
        inputs = processor(
            images=[held_out.rows[row]["images"][place]],
            text=processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True),
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        number = inputs["input_ids"].shape[1]
        mask = (ids == model.config.image_token_id) & (torch.arange(ids.shape[1]) < number)
        embeds = model.get_input_embeddings()(ids.masked_fill(mask, 0))
        embeds[mask] = model.get_image_features(inputs["pixel_values"]).image_features[0]
        logprobs = model(inputs_embeds=embeds).logits[0, number - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, ids[0, number:, None]).sum().item()
        assert answer.log_probability == pytest.approx(expected, rel=1e-3)
        lengths.add(ids.shape[1] - number)
    assert len(lengths) > 1 or max(lengths) == 4


@pytest.mark.slow
def test_grid_with_ood_images(work, tmp_path):  # noqa: F811
    """A copy of the held-out images has the AUROC of chance. Captions get entropies only: they have no questions."""
    rng, questions, captions = random.Random(0), [], []
    for i in range(6):
        name = str(tmp_path / f"{i}.png")
        PILImage.new("L", (28, 28), rng.randrange(256)).save(name)
        questions.append(
            {"image": name, "questions": ["is it red", "what"], "answers": [rng.choice(["yes", "No"]), "a"]}
        )
        captions.append({"image": name, "caption": "a gray square"})
    for name, rows in (("questions", questions), ("captions", captions)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    datasets = {"same": str(work / "test.json"), "gray": str(tmp_path / "questions.json")}
    datasets["captions"] = str(tmp_path / "captions.json")
    evaluate = {
        "dataset": str(work / "test.json"),
        "max_new_tokens": 2,
        "metrics": ["visual_tokens", "ood"],
        "ood_datasets": datasets,
    }
    path = write_grid(work, tmp_path, evaluate=evaluate)
    output = tmp_path / "out"
    assert main(["ablate", str(path), "--output", str(output)]) == 0
    rows = rows_of(output)
    for row in rows:
        held_out, same, gray, caption = (row["ood"][name] for name in ("held out", "same", "gray", "captions"))
        assert {**same, **held_out} == same and same["AUROC of the entropy"]["value"] == 0.5
        assert held_out["accuracy, yes or no"]["n"] == 5 and gray["accuracy, yes or no"]["n"] == 6
        assert held_out["accuracy, yes or no, most frequent answer"]["value"] == 1  # all five answers are yes
        assert caption.keys() == {
            "entropy of visual tokens",
            "entropy of the mean visual token",
            "AUROC of the entropy",
        }
        assert caption["entropy of visual tokens"] == gray["entropy of visual tokens"]
        for metric in ("entropy of visual tokens", "entropy of the mean visual token"):
            assert held_out[metric]["value"] == pytest.approx(row["metrics"][metric], rel=1e-4)
        assert row["metrics"]["AUROC of the entropy: gray"] == gray["AUROC of the entropy"]["value"]
    table = (output / "grid/results.md").read_text()
    assert "## Out-of-distribution images" in table and (output / "grid/ood.png").stat().st_size > 10_000
    assert format_ood(summarize_ood(rows, ["off", "on"])) in table
    assert "Images: held out 5, same 5, gray 6, captions 6." in table


def test_ood_table_over_seeds():
    estimates = [{"value": v, "low": v - 0.1, "high": v + 0.2, "n": 7} for v in (0.5, 0.7)]
    rows = [{"arm": "on", "seed": i, "ood": {"cells": {"accuracy": e}}} for i, e in enumerate(estimates)]
    [summary] = summarize_ood(rows, ["off", "on"])
    assert summary.values == {0: 0.5, 1: 0.7} and summary.sd == pytest.approx(0.1 * 2**0.5)
    header, _, line = format_ood([summary]).splitlines()
    assert header == "| metric | arm | cells |"
    assert line == "| accuracy | on | 60.0% (14.1%); 50.0% – 80.0% |"
