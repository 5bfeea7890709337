# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Closed-form caption alignment, and the metric of caption words."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.composition import decoder_folder, tower_folder  # noqa: F401 - fixtures
from helpers.tiny_models import build_processor
from PIL import Image

from vtlmm.analysis.caption_words import measure_caption_words
from vtlmm.cli.main import main
from vtlmm.data.rows import ROW_FEATURES
from vtlmm.inference.loading import load_model
from vtlmm.train.caption_alignment import align_captions
from vtlmm.train.word_regression import WordRegression


COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30), "white": (235, 235, 235)}


def captioned_images(number: int, seed: int) -> Dataset:
    """Return rows with an image of one noisy color each, and a caption that names the color."""
    generator, rows = np.random.default_rng(seed), []
    for index in range(number):
        word = list(COLORS)[generator.integers(len(COLORS))]
        pixels = np.array(COLORS[word]) + generator.normal(0, 25, size=(28, 28, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
        question = [{"type": "image", "text": None}, {"type": "text", "text": "what is it ?"}]
        answer = [{"type": "text", "text": f"a {word} square"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        image = {"path": f"{index}.png", "bytes": file.getvalue()}
        rows.append({"messages": messages, "images": [image], "num_context_messages": 0})
    return Dataset.from_list(rows, features=ROW_FEATURES)


@pytest.mark.slow
@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("vision", ["clip_vision_model", "mobilenet_v2"])
def test_alignment_names_unseen_images(build_model, projector_type, vision):
    model, processor = build_model(vision=vision, projector_type=projector_type), build_processor()
    if vision == "mobilenet_v2":
        processor.image_processor.size = processor.image_processor.crop_size = {"height": 64, "width": 64}
    before = measure_caption_words(model, processor, captioned_images(24, seed=1))
    decoder = {name: tensor.clone() for name, tensor in model.model.language_model.state_dict().items()}
    result = align_captions(model, processor, captioned_images(96, seed=0))
    after = measure_caption_words(model, processor, captioned_images(24, seed=1))
    assert result.num_images == 96 and result.num_candidates == 5
    assert after.top_word.value > 0.8 > 0.5 > before.top_word.value
    assert after.top_word_lift.low > 0.2 and after.patch_word_lift.low > 0.1
    assert after.num_patch_words <= result.num_candidates
    for name, tensor in model.model.language_model.state_dict().items():
        assert torch.equal(tensor, decoder[name])
    assert "| most likely word of the image |" in after.format()


def test_a_trained_projector_is_kept(build_model, processor):
    model = build_model()
    projector = {name: tensor.clone() for name, tensor in model.model.multi_modal_projector.state_dict().items()}
    align_captions(model, processor, captioned_images(96, seed=0), keep_projector=True)
    assert measure_caption_words(model, processor, captioned_images(24, seed=1)).top_word.value > 0.9
    for name, tensor in model.model.multi_modal_projector.state_dict().items():
        assert torch.equal(tensor, projector[name])


def test_other_tokens_get_no_probability(build_model, processor):
    model = build_model()
    result = align_captions(model, processor, captioned_images(64, seed=0))
    image = Image.new("RGB", (28, 28), "red")
    pixel_values = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    tokens = model.get_visual_tokens(pixel_values, top_k=result.num_candidates)
    words = {word for patch in processor.visual_words(tokens.token_ids)[0] for word in patch}
    assert words == {"red", "blue", "green", "white", "square"}
    assert tokens.probabilities.sum(-1).min() > 0.999


def test_two_layers_compute_the_regression(build_model, processor):
    """act(x) - act(-x) = x, so a projector with two layers equals the linear one up to its rank."""
    features = torch.randn(2, 4, 16)
    models = [build_model(projector_type=projector_type) for projector_type in ("linear", "mlp2x_gelu")]
    for name in ("vision_tower", "language_model"):
        getattr(models[1].model, name).load_state_dict(getattr(models[0].model, name).state_dict())
    for model in models:
        align_captions(model, processor, captioned_images(64, seed=0))
    outputs = [model.model.multi_modal_projector(features) for model in models]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


def random_regression() -> tuple[torch.Tensor, torch.Tensor, WordRegression]:
    """Return inputs `(50, 6)`, word indicators `(50, 4)` and their sums."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 6, generator=generator).double() * torch.arange(1, 7) + 3
    words = (torch.rand(50, 4, generator=generator) < torch.tensor([0.1, 0.3, 0.5, 0.8])).double()
    regression = WordRegression(6, 4, exponent=0.35)
    for start in range(0, 50, 7):
        word_ids = [row.nonzero()[:, 0].tolist() for row in words[start : start + 7]]
        regression.add(inputs[start : start + 7], word_ids)
    return inputs, words, regression


def test_sums_solve_the_ridge_regression():
    """Against least squares on standardized inputs with added rows."""
    inputs, words, regression = random_regression()
    weight, bias = regression.solve(0.5)
    shares = words.mean(0)
    targets = (words - shares) / (shares * (1 - shares)) ** 0.35
    spread = inputs.std(0, correction=0)
    standardized = (inputs - inputs.mean(0)) / spread
    rows = torch.cat([standardized, (0.5 * 50) ** 0.5 * torch.eye(6).double()])
    expected = torch.linalg.lstsq(rows, torch.cat([targets, torch.zeros(6, 4)])).solution
    torch.testing.assert_close(weight, expected / spread[:, None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs.mean(0) @ weight + bias, torch.zeros(4).double())


def test_mapped_sums_equal_sums_of_mapped_inputs():
    inputs, words, regression = random_regression()
    weight, bias = torch.randn(6, 3).double(), torch.randn(3).double()
    expected = WordRegression(3, 4, exponent=0.35)
    expected.add(inputs @ weight + bias, [row.nonzero()[:, 0].tolist() for row in words])
    mapped = regression.mapped(weight, bias)
    for name in ("count", "inputs", "gram", "words", "products"):
        torch.testing.assert_close(getattr(mapped, name), getattr(expected, name))


def test_unusable_input_is_rejected(build_model, processor):
    with pytest.raises(ValueError, match="vm_head_type is 'mlp'"):
        align_captions(build_model(vm_head_type="mlp"), processor, captioned_images(4, seed=0))
    with pytest.raises(ValueError, match="0 images .* at least 32"):
        align_captions(build_model(), processor, captioned_images(4, seed=0))
    with pytest.raises(ValueError, match="1 images"):
        measure_caption_words(build_model(), processor, captioned_images(1, seed=0))


def test_a_folder_is_aligned(build_model, tmp_path, capsys):
    rows = captioned_images(64, seed=0)
    rows.to_parquet(tmp_path / "rows.parquet")
    build_model().save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    folders = [str(tmp_path / name) for name in ("model", "rows.parquet", "aligned")]
    assert main(["align", folders[0], "--dataset", folders[1], "--output", folders[2]]) == 0
    assert "64 captioned images" in capsys.readouterr().out
    model, processor = load_model(folders[2])
    assert measure_caption_words(model, processor, rows).top_word.value > 0.8
    assert main(["align", folders[0], "--dataset", folders[1], "--output", folders[2]]) == 1
    assert "already contains files" in capsys.readouterr().err
    assert main(["align", folders[0], "--dataset", folders[1]]) == 0  # changes the model's folder
    assert measure_caption_words(*load_model(folders[0]), rows).top_word.value > 0.8


def test_wrong_options_of_the_alignment_are_found_before_the_model_is_written(tower_folder, decoder_folder, tmp_path):
    command = ["compose", "--vision", tower_folder("clip"), "--text", decoder_folder("llama"), "--align-captions"]
    output = ["--output", str(tmp_path / "start")]
    assert main([*command, str(tmp_path / "missing.json"), *output]) == 1
    assert main([*command, str(tmp_path / "missing.json"), *output, "--vm-head-type", "mlp"]) == 1
    assert not (tmp_path / "start").exists()
