# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Training with cached features equals training with pixels, and caches of other towers are not used."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import build_processor
from helpers.training import IMAGES_PER_ROW, assert_same_update, build_rows, build_trainer, update, weights
from PIL import Image as PILImage

from modeling_vtlmm import VTLMMForConditionalGeneration, VTLMMProcessor
from vtlmm.data.rows import load_rows
from vtlmm.data.vision_feature_cache import VisionFeatureCache, tower_key, undecoded


EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 1, "learning_rate": 0.1}


def counted(trainer):
    """Return a list that gets the number of images of each later call of the tower."""
    images = []
    tower = trainer.model.model.vision_tower
    tower.register_forward_pre_hook(lambda module, inputs: images.append(len(inputs[0])))
    return images


@pytest.mark.parametrize(
    "settings",
    [
        {"stage": "projector"},
        pytest.param({"stage": "visual_head"}, marks=pytest.mark.slow),
        pytest.param({"stage": "joint", "packing": True, "max_length": 50}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_training_is_the_same_without_the_tower(tmp_path, settings):
    """Two epochs, row by row: several images in a row, and batches without any."""
    expected = update(build_trainer(tmp_path / "pixels", **EPOCHS, **settings))
    trainer = build_trainer(tmp_path / "cache" / "run", cache_image_features=True, **EPOCHS, **settings)
    images = counted(trainer)
    assert_same_update(update(trainer), expected, tolerance=1e-5)
    assert images == [] and (tmp_path / "cache" / "image_features").is_dir()


def test_features_of_a_convolutional_tower(tmp_path):
    """Its map is not contiguous, which safetensors does not store."""
    cache, rows = VisionFeatureCache(str(tmp_path), "tower"), build_rows((2, 1))
    maps = torch.randn(3, 6, 4)
    assert cache.fill(rows, lambda images: maps[: len(images)].transpose(1, 2)) == 3
    images = [image for row in undecoded(rows) for image in row["images"]]
    assert torch.equal(cache[images], maps.transpose(1, 2))


def test_an_image_is_encoded_once_for_all_runs(tmp_path, monkeypatch):
    """Copies in other rows are not encoded again, and evaluation losses equal those with pixels."""
    encoded = []
    original = VTLMMForConditionalGeneration.get_image_features
    monkeypatch.setattr(
        VTLMMForConditionalGeneration,
        "get_image_features",
        lambda self, pixels, **kwargs: encoded.append(len(pixels)) or original(self, pixels, **kwargs),
    )
    rows = build_rows(IMAGES_PER_ROW + (2,))
    rows = rows.select([*range(len(rows)), 0, 2])
    settings = {"cache_image_features": str(tmp_path / "features"), "max_steps": 2}
    first = build_trainer(tmp_path / "a", rows, **settings)
    assert sum(encoded) == sum(IMAGES_PER_ROW) + 2
    assert len(first.data_collator.feature_cache.files) == sum(encoded)
    again = build_trainer(tmp_path / "b", rows, **settings)
    assert sum(encoded) == sum(IMAGES_PER_ROW) + 2
    pixels = build_trainer(tmp_path / "c", rows).evaluate(rows)
    found = again.evaluate(undecoded(rows))
    for name in ("eval_lm_loss", "eval_visual_loss"):
        assert found[name] == pytest.approx(pixels[name], rel=1e-6)


@pytest.mark.slow
def test_a_short_run_does_not_encode_all_images(tmp_path):
    rows, settings = build_rows((1,) * 12), {"per_device_train_batch_size": 2, "max_steps": 3}
    cache = str(tmp_path / "features")
    short = build_trainer(tmp_path / "short", rows, cache_image_features=cache, **settings)
    assert short.data_collator.feature_cache is None and not Path(cache).exists()
    expected = update(build_trainer(tmp_path / "pixels", rows, **settings))
    assert_same_update(update(short), expected, tolerance=1e-6)
    build_trainer(tmp_path / "long", rows, cache_image_features=cache, **{**settings, "max_steps": 6})
    again = build_trainer(tmp_path / "again", rows, cache_image_features=cache, **settings)
    assert len(again.data_collator.feature_cache.files) == 12  # a full cache is used


@pytest.mark.slow
def test_a_resumed_run_uses_the_cache(tmp_path):
    settings = {**EPOCHS, "max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    settings["per_device_train_batch_size"] = 2
    settings |= {"train_sampling_strategy": "random"}
    expected = build_trainer(tmp_path / "pixels", **settings)
    expected.train()
    settings["cache_image_features"] = str(tmp_path / "features")
    build_trainer(tmp_path / "run", **{**settings, "max_steps": 4}).train()
    resumed = build_trainer(tmp_path / "run", **settings)
    images = counted(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert images == [] and resumed.state.global_step == 6
    for (name, a), b in zip(weights(expected.model).items(), weights(resumed.model).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


# ---- A stale cache ----


def change_weights(model, image_processor):
    with torch.no_grad():
        model.model.vision_tower.embeddings.class_embedding[0] += 1e-3


def change_layer(model, image_processor):
    model.config.vision_feature_layer = -1


def change_strategy(model, image_processor):
    model.config.vision_feature_select_strategy = "full"


def change_processor(model, image_processor):
    image_processor.image_mean = [0.5, 0.5, 0.5]


@pytest.mark.parametrize("change", [change_weights, change_layer, change_strategy, change_processor])
def test_the_key_changes_with_all_that_features_depend_on(build_model, change):
    model, image_processor = build_model(), build_processor().image_processor
    key = tower_key(model, image_processor, "no")
    assert key == tower_key(model, image_processor, "no") != tower_key(model, image_processor, "bf16")
    change(model, image_processor)
    assert tower_key(model, image_processor, "no") != key


def test_the_key_is_that_of_the_saved_model(build_model, tmp_path):
    """The next stage starts from a saved folder, with another decoder and the same tower."""
    model, processor = build_model(), build_processor()
    key = tower_key(model, processor.image_processor, "no")
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = VTLMMForConditionalGeneration.from_pretrained(tmp_path)
    assert tower_key(loaded, VTLMMProcessor.from_pretrained(tmp_path).image_processor, "no") == key


@pytest.mark.slow
def test_features_of_another_tower_are_named_and_not_used(tmp_path, capsys):
    folder = tmp_path / "features"
    build_trainer(tmp_path / "one", cache_image_features=str(folder), stage="joint")
    other = {"model_options": {"vision_feature_layer": -1}}
    trainer = build_trainer(tmp_path / "two", cache_image_features=str(folder), **other)
    cache = trainer.data_collator.feature_cache
    assert len(list(folder.iterdir())) == 2 and len(cache.files) == sum(IMAGES_PER_ROW)
    assert "not used: 1 caches of another tower" in cache.describe()
    expected = update(build_trainer(tmp_path / "pixels", **other))
    assert_same_update(update(trainer), expected, tolerance=1e-5)


@pytest.mark.slow
def test_a_changed_image_does_not_hit_the_cache(tmp_path):
    PILImage.new("RGB", (28, 28), (200, 30, 30)).save(tmp_path / "red.png")
    talk = '[{"from": "human", "value": "<image>\\nwhat"}, {"from": "gpt", "value": "red boat"}]'
    Path(tmp_path / "rows.json").write_text(f'[{{"image": "red.png", "conversations": {talk}}}]')
    rows = load_rows(str(tmp_path / "rows.json"))
    trainer = build_trainer(tmp_path / "run", rows, cache_image_features=str(tmp_path / "features"))
    PILImage.new("RGB", (28, 28), (30, 30, 200)).save(tmp_path / "red.png")
    with pytest.raises(ValueError, match="red.png has no features .* its file changed"):
        trainer.train()
    again = build_trainer(tmp_path / "run", rows, cache_image_features=str(tmp_path / "features"))
    assert len(again.data_collator.feature_cache.files) == 2
    again.train()


def test_a_fill_that_was_killed_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("vtlmm.data.vision_feature_cache.IMAGES_PER_FILE", 2)
    cache, rows, encoded = VisionFeatureCache(tmp_path, "tower"), build_rows(), []

    def encode(images):
        encoded.extend(images)
        if len(encoded) > 4:
            raise KeyboardInterrupt
        return torch.stack([torch.full((4, 16), float(image.getpixel((0, 0))[0])) for image in images])

    with pytest.raises(KeyboardInterrupt):
        cache.fill(rows, encode)
    cache.refresh()
    assert len(cache.files) == 4
    assert (
        cache.fill(rows, lambda images: torch.stack([torch.zeros(4, 16) for _ in images])) == sum(IMAGES_PER_ROW) - 4
    )
    images = [image for row in undecoded(rows) for image in row["images"]]
    red = rows[0]["images"][0].getpixel((0, 0))[0]
    assert cache[images].shape == (len(images), 4, 16) and cache[images][0].unique() == red


def test_a_disk_without_room_for_all_is_refused_at_the_first_images(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=9 * 4 * 16 * 4 - 1))
    cache, rows, encoded = VisionFeatureCache(tmp_path, "tower"), build_rows(), []

    def encode(images):
        encoded.extend(images)
        return torch.zeros(len(images), 4, 16)

    with pytest.raises(ValueError, match="features of 9 images need .* free. Set a folder on a larger disk"):
        cache.fill(rows, encode, batch_size=2)
    assert len(encoded) == 2 and not cache.files


def test_what_cannot_be_cached_is_refused(tmp_path):
    cached = {"cache_image_features": str(tmp_path / "features")}
    with pytest.raises(ValueError, match="needs a frozen vision tower"):
        build_trainer(tmp_path, trainable_modules=["vision_tower", "lm_head"], **cached)
    with pytest.raises(ValueError, match="does not support streaming"):
        build_trainer(tmp_path, build_rows().to_iterable_dataset(), **cached)
