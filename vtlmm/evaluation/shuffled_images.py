# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The control of an evaluation: the same questions, with the images of other questions."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from vtlmm.data.images import image_key


def with_shuffled_images(questions: Sequence[Mapping[str, Any]], seed: int = 0) -> list[dict]:
    """
    Return the questions with other images and the same answers.

    All different images form a ring in random order. Each image of a question is replaced by the next image in the
    ring that the question does not have. A question keeps an image only if it has all images of the dataset.

    Args:
        questions (`list[dict]`): with `images`: images, or their keys from [`~vtlmm.data.images.image_key`].
        seed (`int`, *optional*, defaults to 0): seed of the order.
    """
    keys = [[image if isinstance(image, str) else image_key(image) for image in q["images"]] for q in questions]
    images = {
        key: image
        for question, question_keys in zip(questions, keys, strict=True)
        for key, image in zip(question_keys, question["images"], strict=True)
    }
    ring = list(images)
    random.Random(seed).shuffle(ring)
    following = dict(zip(ring, ring[1:] + ring[:1], strict=True))

    def replacement(key: str, question_keys: list[str]) -> str:
        other = following[key]
        while other in question_keys and other != key:
            other = following[other]
        return following[key] if other == key else other

    return [
        {**question, "images": [images[replacement(key, question_keys)] for key in question_keys]}
        for question, question_keys in zip(questions, keys, strict=True)
    ]
