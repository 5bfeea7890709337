# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Read the annotation files of COCO, VQA, Visual Genome, TextVQA and Flickr30k as rows."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


# Where the images of an image id are, relative to `image_folder`; the first file that exists is used
IMAGE_PATTERNS = (
    "{name}",
    "{split}/{name}",
    "COCO_{split}_{id:0>12}.jpg",
    "{split}/COCO_{split}_{id:0>12}.jpg",
    "{id:0>12}.jpg",
    "{split}/{id:0>12}.jpg",
    "{id}.jpg",
    "VG_100K/{id}.jpg",
    "VG_100K_2/{id}.jpg",
    "train_images/{id}.jpg",
    "test_images/{id}.jpg",
)


def annotation_rows(content: Any, path: Path, folder: str, load: Callable[[Path], Any]) -> Iterator[dict]:
    r"""
    Yield the rows of the content of a JSON file.

    Args:
        content: a list of rows, or a dict in the format of COCO captions, VQA questions, TextVQA (`data`), or
            Karpathy's splits (`images` with `sentences`).
        path (`Path`): the file. The annotations of VQA questions are read from the file next to it.
        folder (`str`): folder of the images.
        load (`Callable`): reads another JSON file.

    Raises:
        `ValueError`: if the content is neither a list nor one of these dicts.
    """
    if isinstance(content, list):
        for row in content:
            yield _visual_genome_row(row, folder) if isinstance(row, dict) and "qas" in row else row
        return
    keys = content.keys() if isinstance(content, dict) else set()
    if {"images", "annotations"} <= keys:
        yield from _coco_captions(content, folder)
    elif keys and isinstance(content.get("questions"), list) and isinstance(content["questions"][0], dict):
        yield from _vqa_questions(content, path, folder, load)
    elif keys and isinstance(content.get("images"), list) and "sentences" in content["images"][0]:
        for image in content["images"]:
            yield {"image": image["filename"], "captions": [sentence["raw"] for sentence in image["sentences"]]}
    elif isinstance(content.get("data") if keys else None, list):
        for row in content["data"]:
            image = {} if "image" in row or "image_id" not in row else {"image": _image_path(folder, row["image_id"])}
            yield {**row, **image}
    else:
        description = f"a dict with {sorted(keys)[:8]}" if keys else f"a {type(content).__name__}"
        raise ValueError(f"{path} must hold a list of rows, not {description}.")


def caption_lines(lines: Iterator[str], path: Path) -> Iterator[dict]:
    """Yield the rows of Flickr's `.token` files: `image.jpg#0`, a tab, and a caption."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        name, tab, caption = line.strip().partition("\t")
        if line.strip() and not tab:
            raise ValueError(f"{path}, line {number} has no tab between the image and the caption.")
        if tab:
            captions.setdefault(name.partition("#")[0], []).append(caption.strip())
    for name, texts in captions.items():
        yield {"image": name, "captions": texts}


def _image_path(folder: str, image_id: Any, split: str = "", name: str = "") -> str:
    """Return the path of the image of an id, relative to `folder`. If no file exists, return the most usual name."""
    names = [pattern.format(id=image_id, split=split, name=name) for pattern in IMAGE_PATTERNS]
    names = [candidate for candidate in names if candidate.strip("/")]
    usual = name or (names[0] if split else f"{image_id}.jpg")
    return next((candidate for candidate in names if Path(folder, candidate).is_file()), usual)


def _coco_captions(content: dict, folder: str) -> Iterator[dict]:
    """COCO: one row per caption, in the order of the annotations."""
    files = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        image = files.get(annotation.get("image_id"))
        row = {key: value for key, value in annotation.items() if key == "caption"}
        yield {**row, **({} if image is None else {"image": _image_path(folder, annotation["image_id"], name=image)})}


def _vqa_questions(content: dict, path: Path, folder: str, load: Callable[[Path], Any]) -> Iterator[dict]:
    """VQA: the questions of one file, the answers of the file next to it."""
    name = path.name.replace("OpenEnded_", "").replace("MultipleChoice_", "").replace("questions", "annotations")
    file = path.with_name(name)
    answers = {}
    if name != path.name and file.is_file():
        answers = {row["question_id"]: row for row in load(file)["annotations"]}
    elif "annotations" not in content and "test" not in path.name:
        raise ValueError(f"{path} holds questions without answers. Put their annotations next to it, as {name}.")
    split = content.get("data_subtype", "")
    for question in content["questions"]:
        row = answers.get(question.get("question_id"), {})
        columns = {key: row[key] for key in ("answers", "multiple_choice_answer") if key in row}
        yield {**question, **columns, "image": _image_path(folder, question["image_id"], split)}


def _visual_genome_row(row: dict, folder: str) -> dict:
    """Visual Genome: the questions and answers of one image."""
    image_id = row.get("id", row.get("image_id"))
    return {
        "image": _image_path(folder, image_id),
        "questions": [qa.get("question") for qa in row["qas"]],
        "answers": [qa.get("answer") for qa in row["qas"]],
    }


def parse_json(text: str, path: Path) -> Any:
    """
    Return the content of a JSON file. A file with one row per line is read as a list.

    Raises:
        `ValueError`: if the text is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        lines = [line for line in text.split("\n") if line.strip()]
        try:
            if len(lines) > 1:
                return [json.loads(line) for line in lines]
        except ValueError:
            pass
        raise ValueError(f"{path} is not JSON: {error}.") from error
