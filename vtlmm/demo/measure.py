# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Measure the demo's model: held-out questions, the words of its patches, and loading without this package."""

import random
import tempfile
import textwrap
from itertools import islice
from pathlib import Path

from vtlmm.analysis.plots import save_patch_words
from vtlmm.analysis.visual_tokens import read_visual_tokens
from vtlmm.data.markdown import markdown_table
from vtlmm.evaluation.scorers import accuracy_by_kind
from vtlmm.evaluation.shuffled_images import with_shuffled_images
from vtlmm.hub.isolated_load import run_without_package
from vtlmm.inference.generation import answer

from .shapes import KINDS, Scene, describe_patches, draw, make_scenes, questions


NUM_SCENES = 200  # held-out images whose patches are compared with the truth
NUM_PLOTTED = 8

Accuracy = dict[str, tuple[float, int]]  # kind to accuracy and number of questions


def held_out_accuracy(model, processor, asked: list[dict], seed: int) -> tuple[Accuracy, Accuracy]:
    """Return the accuracy by kind of question, with the right images and with shuffled images."""
    shuffled = with_shuffled_images(asked, seed)
    return (
        accuracy_by_kind(asked, answer(model, processor, asked, batch_size=64)),
        accuracy_by_kind(shuffled, answer(model, processor, shuffled, batch_size=64)),
    )


def format_accuracy(accuracy: Accuracy, accuracy_shuffled_images: Accuracy) -> str:
    """Return a Markdown table of the accuracy by kind of question."""
    rows = []
    for kind in [*sorted(set(accuracy) - {"all"}), "all"]:
        share, number = accuracy[kind]
        rows.append([kind, number, f"{share:.1%}", f"{accuracy_shuffled_images[kind][0]:.1%}"])
    return markdown_table(["kind", "questions", "accuracy", "shuffled images"], rows)


def held_out_scenes(seed: int, number: int = NUM_SCENES) -> list[Scene]:
    """Return held-out scenes for the measurements of patches."""
    return list(islice(make_scenes(random.Random(seed), held_out=True), number))


def correct_patches(words: list[str], scene: Scene) -> list[bool]:
    """Return for each patch whether its word is the color or the shape there, or "empty" in an empty cell."""
    return [word in truth[:2] for word, truth in zip(words, describe_patches(scene), strict=True)]


def named_patches(model, processor, scenes: list[Scene]) -> dict[str, float]:
    """
    Return the share of patches whose likeliest word is correct.

    Returns:
        `dict[str, float]`: `share`, and `shuffled`: the same, compared with another image.
    """
    pixel_values = processor.image_processor([draw(scene) for scene in scenes], return_tensors="pt")["pixel_values"]
    words = processor.visual_words(model.get_visual_tokens(pixel_values, top_k=1).token_ids[..., 0])

    def share(truth: list[Scene]) -> float:
        correct = [patch for row, scene in zip(words, truth, strict=True) for patch in correct_patches(row, scene)]
        return sum(correct) / len(correct)

    return {"share": share(scenes), "shuffled": share(scenes[1:] + scenes[:1])}


def plot_patch_words(path: Path, model, processor, scenes: list[Scene], seed: int) -> None:
    """Save a PNG with the words of the patches of eight images, each with a question and its answer."""
    scenes, rng = scenes[:NUM_PLOTTED], random.Random(seed)
    images, asked = [draw(scene) for scene in scenes], []
    for i, scene in enumerate(scenes):
        question = questions(scene, rng, (KINDS[i % len(KINDS)], "color"))[0]
        asked.append({"images": [images[i]], "question": question.question, "answer": question.answer})
    answers = answer(model, processor, asked, batch_size=NUM_PLOTTED)
    titles = [
        f"{question['question']}\n{text}" + ("" if text == question["answer"] else f" (wrong: {question['answer']})")
        for question, text in zip(asked, answers, strict=True)
    ]
    tokens = read_visual_tokens(model, processor, images, top_k=1)
    correct = [
        correct_patches([word for word, _ in image_tokens.labels], scene)
        for image_tokens, scene in zip(tokens, scenes, strict=True)
    ]
    number, total = sum(map(sum, correct)), sum(map(len, correct))
    caption = (
        f"{number} of the {total} words are correct: the color or the shape in the patch, or “empty”. "
        "An orange frame marks a wrong word."
    )
    save_patch_words(path, processor, images, tokens, titles, caption, correct)


ASK = textwrap.dedent(
    """
    import sys

    from transformers import pipeline

    folder, image, question = sys.argv[1:]
    ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    content = [{"type": "image", "path": image}, {"type": "text", "text": question}]
    result = ask(text=[{"role": "user", "content": content}], max_new_tokens=16, do_sample=False)
    print(result[0]["generated_text"][-1]["content"].strip())
    """
)


def ask_without_package(folder: Path, image: Path, question: str) -> str:
    """Return the answer of transformers' pipeline in a process that cannot import this package."""
    with tempfile.TemporaryDirectory() as empty:
        result = run_without_package(ASK, folder.resolve(), image.resolve(), question, folder=empty)
    if result.returncode:
        raise RuntimeError(f"The saved model does not load without this package:\n{result.stderr[-2000:]}")
    return result.stdout.strip().splitlines()[-1]
