# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Compute the vision features of all images of a training run once, before the first step."""

from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from vtlmm.data.images import prepare_images
from vtlmm.data.vision_feature_cache import VisionFeatureCache, tower_key

from .collator import VTLMMCollator


def cache_vision_features(trainer: Any, model: Any, datasets: list) -> VisionFeatureCache | None:
    """
    Return the cache in `args.cache_image_features` with the features of all images, or None without images.

    The processes share the missing images. A run with `max_steps` that draws fewer rows than images are missing does
    not use the cache: to encode the images of its rows is faster.

    Args:
        trainer ([`VTLMMTrainer`]): gives the precision, the image processor and the folder.
        model ([`VTLMMForConditionalGeneration`]): without the wrapper of an adapter.
        datasets (`list` of [`~datasets.Dataset`]): rows whose images are encoded; entries may be None.

    Raises:
        `ValueError`: with a data collator that does not read the cache, or if FSDP would have to encode images.
    """
    if not isinstance(trainer.data_collator, VTLMMCollator):
        raise ValueError("`cache_image_features` works with a VTLMMCollator only. Remove `data_collator`.")
    accelerator, tower = trainer.accelerator, model.model.vision_tower.eval()
    image_processor = trainer.processing_class.image_processor
    # One process computes the key for all: it covers the weights, which may be sharded.
    key = [tower_key(model, image_processor, accelerator.mixed_precision) if trainer.is_world_process_zero() else None]
    cache = VisionFeatureCache(trainer.args.cache_image_features, broadcast_object_list(key)[0])

    @torch.no_grad()
    def encode(images: list) -> torch.Tensor:
        if trainer.is_fsdp_enabled:
            raise ValueError(
                "FSDP has not moved the vision tower to a GPU yet. Fill `cache_image_features` with the same command "
                "on one process: stop it after the first step, then start again."
            )
        images = prepare_images(images, image_processor)
        pixel_values = image_processor(images, return_tensors="pt")["pixel_values"].float()
        with accelerator.autocast():
            return model.get_image_features(pixel_values.to(tower.device)).vision_features

    args = trainer.args
    num_rows = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.max_steps > 0 and datasets[0] is not None and num_rows < len(datasets[0]):
        missing = cache.num_missing(datasets[0])
        if missing > num_rows:
            if trainer.is_world_process_zero():
                print(f"The {num_rows:,} rows of {args.max_steps:,} steps are encoded without a cache.")
            return None
    for dataset in datasets:
        cache.fill(dataset, encode)
    if trainer.is_world_process_zero():
        print(cache.describe())
    return cache if cache.files else None
