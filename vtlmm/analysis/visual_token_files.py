# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Save the visual tokens of images: a PNG per image, one HTML page and JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from vtlmm.data.images import open_image
from vtlmm.data.output_files import require_other_place, write_json
from vtlmm.data.rows import load_rows
from vtlmm.data.setting_values import require_integers
from vtlmm.evaluation.questions import image_loader, read_questions

from .patch_features import shown_image
from .plots import save_visual_token_plot
from .visual_token_page import visual_token_page
from .visual_tokens import read_visual_tokens


TOKENS_FILE, TOKENS_PAGE = "tokens.json", "tokens.html"


def save_visual_tokens(
    model,
    processor,
    output: str | Path,
    *,
    images: list | None = None,
    names: list[str] | None = None,
    dataset: str | Path | Dataset | None = None,
    image_folder: str | None = None,
    split: str = "train",
    columns: Mapping[str, Any] | None = None,
    limit: int = 32,
    top_k: int = 5,
    overwrite: bool = False,
) -> Path:
    r"""
    Write the visual tokens of images to a folder: `tokens.html`, `tokens.json` and a PNG per image.

    Args:
        model ([`VTLMMForConditionalGeneration`]), processor ([`VTLMMProcessor`])
        output (`str` or `Path`): Folder to write to.
        images (`list`, *optional*): Paths of images, or images from PIL.
        names (`list[str]`, *optional*): Titles of the images. Paths are their own titles.
        dataset (`str`, `Path` or [`~datasets.Dataset`], *optional*): Dataset whose images are used instead.
        image_folder, split, columns (*optional*): See [`~vtlmm.data.rows.load_rows`].
        limit (`int`, *optional*, defaults to 32): Number of rows of the dataset to use.
        top_k (`int`, *optional*, defaults to 5): Number of words per patch.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace existing results.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: Unless exactly one of `images` and `dataset` is specified, or if the dataset has no image.
        FileExistsError: If the folder contains visual tokens and `overwrite` is not set.
    """
    require_integers(limit=limit, top_k=top_k)
    folder = _check_folder(output, overwrite, dataset=dataset, image_folder=image_folder)
    if (images is None) == (dataset is None):
        raise ValueError("Specify either images or a dataset.")
    if dataset is None:
        titles, opened = open_images(images or [])
    else:
        titles, opened = images_of_rows(dataset, image_folder, split, limit, columns)
    names = names or titles
    progress = tqdm(opened, desc="reading images", disable=len(opened) < 4)
    tokens = [read_visual_tokens(model, processor, [image], top_k)[0] for image in progress]
    shown = [shown_image(processor, image) for image in opened]
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, image, image_tokens) in enumerate(zip(names, shown, tokens, strict=True)):
        save_visual_token_plot(folder / f"{i}_{Path(name).stem}.png", image, image_tokens, Path(name).name)
    (folder / TOKENS_PAGE).write_text(visual_token_page(names, shown, tokens), encoding="utf-8")
    content = {
        "model": model.name_or_path,
        "top_k": top_k,
        "images": [{"image": name, **asdict(image_tokens)} for name, image_tokens in zip(names, tokens, strict=True)],
    }
    write_json(folder / TOKENS_FILE, content, indent=None)
    return folder


def _check_folder(output: str | Path, overwrite: bool, **inputs: Any) -> Path:
    require_other_place(output, **inputs)
    if Path(output, TOKENS_FILE).exists() and not overwrite:
        name = Path(output, TOKENS_FILE)
        raise FileExistsError(f"{name} exists. Choose another output folder, or set `overwrite=True`.")
    return Path(output)


def open_images(images: list) -> tuple[list[str], list[Image.Image]]:
    """Return the names and the images, in RGB, of paths or images from PIL."""
    if not images:
        raise ValueError("The list of images is empty.")
    names, opened = [], []
    for i, image in enumerate(images):
        names.append(f"image {i}" if isinstance(image, Image.Image) else str(image))
        opened.append(open_image(image))
    return names, opened


def images_of_rows(
    dataset: str | Path | Dataset,
    image_folder: str | None = None,
    split: str = "train",
    limit: int = 32,
    columns: Mapping[str, Any] | None = None,
) -> tuple[list[str], list[Image.Image]]:
    """Return the names and the different images of the first `limit` rows of a dataset."""
    require_integers(limit=limit)
    if isinstance(dataset, Dataset):
        rows = dataset
    else:
        rows = load_rows(dataset, image_folder=image_folder, split=split, columns=columns)
    rows = rows.select(range(min(limit, len(rows))))
    _, image_positions = read_questions(rows)
    if not image_positions:
        raise ValueError(f"The first {len(rows)} rows of the dataset contain no image.")
    load = image_loader(rows, image_positions)
    names = [f"row {row}" + (f", image {position}" if position else "") for row, position in image_positions.values()]
    return names, [load(key) for key in image_positions]
