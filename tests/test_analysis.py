# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`analyze` and `vtlmm analyze` on tiny models."""

import json
import random
from dataclasses import asdict

import pytest
import torch
from helpers.analysis import NUM_IMAGES, make_image, model, work  # noqa: F401 - fixtures
from helpers.tiny_models import WORDS
from PIL import Image

from vtlmm.analysis.dataset_analysis import Analysis, AnalysisResult, analyze, analyze_images
from vtlmm.analysis.failure_modes import evenly_spaced, measure_failure_modes
from vtlmm.analysis.labels import Labels
from vtlmm.analysis.metrics import word_probabilities
from vtlmm.analysis.patch_features import heads, patches_inside, read_patches
from vtlmm.analysis.report import summarize_analysis
from vtlmm.analysis.visual_tokens import read_visual_tokens
from vtlmm.analysis.vocabulary import content_words
from vtlmm.cli.main import main
from vtlmm.data.rows import load_rows


# Tokens that can be a label: `<unk>` to `<pad>` are control tokens
NAMES = [word for word in WORDS if content_words([word])]


def test_lens_of_last_layer_equals_logits(model, processor):
    """The decoder's prediction of a patch comes from the position left of it. Batching does not change it."""
    images = [make_image(i) for i in range(3)]
    patches = read_patches(model, processor, images)
    vm_weight, lm_weight, _ = heads(model)
    last = max(patches.layer_states)
    assert sorted(patches.layer_states) == [0, 1, 2]
    for i, image in enumerate(images):
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it ?"}]}],
            tokenize=False,
        )
        inputs = processor(images=[image], text=text, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs, output_visual_logits=True)
        positions = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().squeeze(1)
        logits = outputs.logits[0, :, : len(lm_weight)]
        for states, expected in (
            (patches.layer_states[last][i], logits[positions]),
            (patches.left_states[i], logits[positions - 1]),
        ):
            torch.testing.assert_close(word_probabilities(states, lm_weight), expected.softmax(-1), atol=1e-5, rtol=0)
        visual = word_probabilities(patches.mixed_features[i], vm_weight)
        torch.testing.assert_close(visual, outputs.visual_logits.softmax(-1), atol=1e-5, rtol=0)
        alone = read_patches(model, processor, [image])
        for layer, states in patches.layer_states.items():
            torch.testing.assert_close(states[i : i + 1], alone.layer_states[layer], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches.layer_states[0], model.model.language_model.norm(patches.image_features))


def analyze_tiny(model, processor, images, labels=None, **options) -> AnalysisResult:
    keys = [str(i) for i in range(len(images))]
    labels = labels or [Labels([random.Random(i).choice(WORDS[10:])]) for i in range(len(images))]
    labels_by_image = dict(zip(keys, labels, strict=True))
    return analyze_images(model, processor, labels_by_image, lambda key: images[int(key)], **options)


def flatten(value, name: str = "") -> dict:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flatten(part, f"{name}/{key}").items()}
    return {name: value}


def test_batch_size_does_not_change_metrics(model, processor):
    images = [make_image(i) for i in range(NUM_IMAGES)]
    one, whole = (
        flatten(asdict(analyze_tiny(model, processor, images, batch_size=size, layers=True)))
        for size in (1, NUM_IMAGES)
    )
    assert one.keys() == whole.keys() and len(one) > 200
    for name, value in whole.items():
        if isinstance(value, float):
            assert one[name] == pytest.approx(value, abs=1e-4, nan_ok=True), name
        elif not name.endswith("/images"):
            assert one[name] == value, name


def test_layers_are_read_on_request_only(model, processor):
    images = [make_image(i) for i in range(3)]
    lenses = analyze_tiny(model, processor, images).lenses
    assert set(lenses) == {"vm_head", "random_head", "cosine", "pseudo_cosine", "decoder"}
    assert {"layer_0", "layer_1", "layer_2"} < set(analyze_tiny(model, processor, images, layers=True).lenses)


def test_identical_images_have_no_information(model, processor):
    tokens = read_visual_tokens(model, processor, [make_image(i) for i in range(NUM_IMAGES)], 1)
    varied = max(range(NUM_IMAGES), key=lambda i: len({patch[0][0] for patch in tokens[i].vm_head}))
    result = analyze_tiny(model, processor, [make_image(varied)] * NUM_IMAGES)
    diversity = result.diversity["vm_head"]
    assert diversity["information_image"].value == pytest.approx(0, abs=1e-5)
    assert diversity["information_patch"].value > 0.1  # the patches of the image differ
    assert any("of vm_head are collapsed" in text and "every image gets" in text for text in result.warnings)
    other = analyze_tiny(model, processor, [make_image(i) for i in range(NUM_IMAGES)])
    assert other.diversity["vm_head"]["information_image"].low > 0.05
    assert not any("vm_head" in text for text in other.warnings)


def test_constant_head_is_reported_as_collapsed(model, processor):
    with torch.no_grad():
        model.model.vm_head.weight.zero_()
    result = analyze_tiny(model, processor, [make_image(i) for i in range(NUM_IMAGES)])
    assert sum("of vm_head are collapsed" in text for text in result.warnings) == 2
    assert "untrained VM head" in result.summary() and "are collapsed" in result.summary()


def test_diversity_equals_that_of_all_tokens(model, processor):
    images = [make_image(i) for i in range(NUM_IMAGES)]
    result = analyze_tiny(model, processor, images, batch_size=3)
    diversity = result.diversity["vm_head"]
    patches = read_patches(model, processor, images)
    p = word_probabilities(patches.mixed_features.flatten(0, 1), heads(model)[0]).double()
    of_patches = torch.special.entr(p).sum(-1)
    mean = torch.special.entr(p.mean(0)).sum()
    of_images = torch.special.entr(p.view(NUM_IMAGES, -1, p.shape[1]).mean(1)).sum(-1)
    assert diversity["entropy"].value == pytest.approx(of_patches.mean().item(), abs=1e-5)
    assert diversity["effective_support"].value == pytest.approx(of_patches.exp().mean().item(), rel=1e-5)
    assert diversity["information_patch"].value == pytest.approx((mean - of_patches.mean()).item(), abs=1e-5)
    assert diversity["information_image"].value == pytest.approx((mean - of_images.mean()).item(), abs=1e-5)
    assert result.distinct_top_words["vm_head"] == len(p.argmax(-1).unique())


def labels_by_the_head(model, processor, images) -> list[Labels]:
    """Return the likeliest word of each image's first patch as its label."""
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    words = processor.visual_words(model.get_visual_tokens(pixel_values, top_k=1).token_ids[:, 0, 0])
    return [Labels([word]) for word in words]


def test_labels_from_the_head_are_hit(model, processor):
    images = [make_image(i) for i in range(NUM_IMAGES)]
    result = analyze_tiny(model, processor, images, labels_by_the_head(model, processor, images))
    hit, mass = result.lenses["vm_head"]["hit@1"], result.lenses["vm_head"]["mass"]
    assert hit.agreement.value == 1 and hit.agreement.n == result.num_labeled_images > 3
    assert hit.lift.value == pytest.approx(1 - hit.shuffled) and hit.lift.low > 0
    assert hit.lift_over_random_head.low > 0
    assert mass.agreement.value > mass.shuffled and "mass" not in result.lenses["cosine"]


def test_verdict_follows_the_labels(model, processor):
    images = [make_image(i) for i in range(NUM_IMAGES)]
    labels = labels_by_the_head(model, processor, images)
    good = summarize_analysis(analyze_tiny(model, processor, images, labels))
    assert good[0].startswith("Verdict: the VM head names what is in the images better than chance; in 100% of ")
    assert 5 <= len(good) <= 10
    unknown = summarize_analysis(analyze_tiny(model, processor, images, [Labels(["zebra"])] * NUM_IMAGES))
    assert unknown[0].startswith("Verdict: unknown. Only 0 of 14 images have a label word")
    same = summarize_analysis(analyze_tiny(model, processor, images, [Labels([NAMES[3]])] * NUM_IMAGES))
    assert same[0].startswith("Verdict: the VM head does not name what is in the images better than chance")


def test_random_head_has_rows_of_equal_norm(model, processor):
    analysis = Analysis(model, processor, [Labels(["red"])])
    assert not torch.allclose(analysis.random_weight, analysis.vm_weight, atol=1e-2)
    torch.testing.assert_close(analysis.random_weight.norm(dim=1), analysis.vm_weight.norm(dim=1))


def test_boxes_follow_the_image_processor(processor):
    image = Image.new("RGB", (56, 28))  # the processor resizes it to 28 × 28 pixels
    assert patches_inside(processor, image, [[28, 0, 56, 14]], 4).tolist() == [False, True, False, False]
    assert patches_inside(processor, image, [[0, 0, 28, 14], [0, 14, 56, 28]], 4).tolist() == [True, False, True, True]
    assert patches_inside(processor, image, [[0, 0, 8, 8]], 4).tolist() == [False] * 4
    with pytest.raises(ValueError, match="5 patches do not form a square"):
        patches_inside(processor, image, [], 5)


def test_locality_of_a_word_inside_its_box_is_1(model, processor):
    images = [make_image(i) for i in range(6)]
    mixed = read_patches(model, processor, images).mixed_features
    boat = processor.tokenizer.convert_tokens_to_ids("boat")
    labels = []
    for features in mixed:
        best = word_probabilities(features, heads(model)[0])[:, boat].argmax().item()
        x, y = 14 * (best % 2), 14 * (best // 2)
        labels.append(Labels(["boat"], {"boat": [[x, y, x + 14, y + 14]]}))
    result = analyze_tiny(model, processor, images, labels)
    assert result.locality.value == pytest.approx(1)
    assert "where the labeled object is: AUROC 1.00" in result.summary()


def test_failure_modes_by_hand(model, processor, monkeypatch):
    questions = [
        {"images": [str(i)], "question": f"is it red {i} ?", "answer": "yes" if i % 4 == 0 else "no"} for i in range(8)
    ]

    def answers(model, processor, questions, *_):
        if model.config.use_pseudo_image_features:
            return ["yes"] * 8  # two correct answers
        return ["no" if i < 4 else "yes" for i in range(8)] if model is not previous[0] else ["no"] * 8

    monkeypatch.setattr("vtlmm.analysis.failure_modes.answer", answers)
    previous = (type("Model", (), {"config": type("Config", (), {"use_pseudo_image_features": False})})(), None)
    modes = measure_failure_modes(model, processor, questions, lambda key: None, previous)
    assert modes["vqa_score"].value == 4 / 8
    assert modes["hallucination_rate"].value == 3 / 6 and modes["hallucination_rate"].n == 6
    assert modes["pseudo_image_feature_gap"].value == 4 / 8 - 2 / 8
    assert modes["stage_instability"].value == 3 / 8
    assert measure_failure_modes(model, processor, questions, lambda key: None)["stage_instability"] is None
    assert not model.config.use_pseudo_image_features
    chosen = evenly_spaced([*questions, {"images": []}], 4)
    assert [question["images"] for question in chosen] == [["0"], ["2"], ["4"], ["6"]]


# ---- The function and the command ----


def test_analyze_accepts_loaded_rows(work, model, processor):
    rows = load_rows(work / "rows.jsonl")
    result = analyze(model, processor, rows, num_questions=0)
    assert result.num_images == NUM_IMAGES and result.failure_modes == {}
    assert asdict(result) == asdict(analyze(model, processor, work / "rows.jsonl", num_questions=0)) | {
        "about": result.about
    }


def test_analyze_rejects_bad_settings(work, model, processor):
    for options in ({"batch_size": 0}, {"limit": 0}, {"num_questions": -1}, {"seed": -1}, {"batch_size": 2.0}):
        [name] = options
        with pytest.raises(ValueError, match=f"`{name}` is .* It must be a whole number of at least"):
            analyze(model, processor, work / "rows.jsonl", **options)
    llava = type("Model", (), {"config": type("Config", (), {"model_type": "llava"}), "name_or_path": "a"})()
    with pytest.raises(ValueError, match="is a llava model"):
        analyze(llava, processor, work / "rows.jsonl")
    (work / "control.json").write_text(json.dumps([{"image": "0.png", "question": "what </s>", "answer": "red"}]))
    with pytest.raises(ValueError, match="row 0: control token"):
        analyze(model, processor, work / "control.json")


def test_analyze_command_starts_with_a_verdict(work, tmp_path, capsys):
    command = ["analyze", str(work / "model"), "--dataset", str(work / "rows.jsonl"), "--labels", "what"]
    options = ["--questions", "2", "--previous", str(work / "model"), "--output", str(tmp_path)]
    assert main([*command, *options, "--limit", str(NUM_IMAGES - 1)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Verdict: ") and 6 <= len(printed) <= 12
    result = json.loads((tmp_path / "analysis.json").read_text())
    assert result["num_images"] == NUM_IMAGES - 1 and result["subset"] == "the first 13 of 14 rows"
    assert printed[:-1] == result["summary"]
    assert set(result["failure_modes"]) == {
        "vqa_score",
        "hallucination_rate",
        "pseudo_image_feature_gap",
        "stage_instability",
    }
    assert result["failure_modes"]["stage_instability"]["value"] == 0  # both stages are the same model
    named = [word for word in WORDS[9 : 9 + NUM_IMAGES - 1] if content_words([word])]
    assert result["locality"]["n"] == result["num_labeled_images"] == len(named) > 3
    table = (tmp_path / "analysis.md").read_text()
    hit = result["lenses"]["vm_head"]["hit@5"]["agreement"]
    assert f"| VM head | {hit['value']:.3f} [{hit['low']:.3f}, {hit['high']:.3f}] |" in table
    assert "SUBSET: the first 13 of 14 rows" in table and "## Locality" in table and "## Neighborhoods" in table


def test_analyze_command_keeps_existing_results(work, tmp_path, capsys):
    command = ["analyze", str(work / "model"), "--dataset", str(work / "rows.jsonl"), "--questions", "0"]
    (tmp_path / "analysis.json").write_text("{}")
    assert main([*command, "--output", str(tmp_path)]) == 1
    assert "exists. Choose another output folder, or set `overwrite=True`" in capsys.readouterr().err
    assert (tmp_path / "analysis.json").read_text() == "{}"
    assert main([*command, "--output", str(tmp_path), "--overwrite"]) == 0
    assert main([*command, "--labels", "nothing", "--output", str(tmp_path), "--overwrite"]) == 1
    assert "'nothing'" in capsys.readouterr().err
