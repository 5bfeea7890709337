# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Captioned images: the rows of a dataset, merged by image, with the content words of their captions."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Image, List

from vtlmm.data.images import image_key

from .vocabulary import content_words


@dataclass
class CaptionedImage:
    """
    One image with all its captions.

    Args:
        image (`dict`): undecoded image with `path` and `bytes`.
        row (`int`): number of the image's first row.
        captions (`list[str]`): answers of all rows about this image.
        words (`set[str]`): their content words, in lower case.
    """

    image: dict[str, Any]
    row: int
    captions: list[str]
    words: set[str]


def captioned_images(rows: Dataset) -> list[CaptionedImage]:
    """
    Return the images of `rows` whose answers have a content word. Rows with no image or several images are left out.

    Rows about one image are merged, so that a dataset may have one row per image or one row per caption.

    Args:
        rows ([`~datasets.Dataset`]): rows of [`load_rows`]. The answers are the captions.
    """
    rows = rows.select_columns(["messages", "images"]).cast_column("images", List(Image(decode=False)))
    images: dict[str, CaptionedImage] = {}
    for number, row in enumerate(rows):
        captions = answer_texts(row["messages"])
        if len(row["images"]) != 1 or not captions:
            continue
        image = row["images"][0]
        key = image_key(image) if image["bytes"] is not None else image["path"]
        images.setdefault(key, CaptionedImage(image, number, [], set())).captions += captions
    for captioned in images.values():
        captioned.words = content_words(captioned.captions)
    return [captioned for captioned in images.values() if captioned.words]


def answer_texts(messages: list[dict]) -> list[str]:
    """Return the texts of the assistant's turns of one row."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return [part["text"] for content in answers for part in content if part["text"]]
