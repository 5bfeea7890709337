# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A run over one's own questions: answers are written as they come, and a run that was killed goes on where it was."""

from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import gather_object

from vtlmm.inference.generation import (
    accuracy_by_kind,
    answer,
    with_shuffled_images,
)
from vtlmm.inference.resumable import answer_all, open_run

from .questions import image_loader, read_questions, with_prompt


RUN_FILE, ANSWERS_FILE, BLIND_FILE = "run.json", "answers.jsonl", "blind.jsonl"


def run_questions(
    model,
    processor,
    rows,
    questions: list[dict],
    places: dict,
    output: str | Path,
    key: dict,
    batch_size: int = 8,
    about: dict | None = None,
) -> tuple[list[str], list[str] | None]:
    r"""
    Answers with the right images and with shuffled ones, into the folder `output`; goes on with a run that is there.

    Args:
        rows, questions, places: see [`read_questions`].
        key (`dict`): of [`run_key`]; how to ask is in its settings.
        about (`dict`, *optional*): what else `run.json` shall say.

    Returns:
        `tuple[list[str], list[str] | None]`: answers and those of the blind control, which there is not without two
        different images.

    Raises:
        `ValueError`: when `output` holds another run.
    """
    output, settings = Path(output), key["settings"]
    about = {**(about or {}), "num_questions": len(questions)}
    open_run(output / RUN_FILE, [output / ANSWERS_FILE, output / BLIND_FILE], key, about)
    asked = with_prompt(questions, settings["prompt"])
    arguments = (image_loader(rows, places), batch_size, settings["max_new_tokens"])
    answers = answer_all(output / ANSWERS_FILE, model, processor, asked, *arguments)
    if len(places) < 2:
        return answers, None
    control = with_shuffled_images(asked, settings["seed"])
    return answers, answer_all(output / BLIND_FILE, model, processor, control, *arguments)


# ---- During training ----


def task_scores(rows, processor, num_images: int, batch_size: int = 8, seed: int = 0):
    r"""
    A function that answers the questions about the first images of `rows` and scores them by exact match.

    It draws no random number and leaves the model in the mode that it found, so training goes on as without it.
    Several processes share the questions, and each gets the scores over all of them.

    Args:
        rows ([`~datasets.Dataset`]): see [`read_questions`].
        num_images (`int`): so many different images; they are kept decoded.
        seed (`int`, *optional*, defaults to 0): of the shuffled images.

    Returns:
        callable: model to `dict` with `accuracy` and, with at least two images, `accuracy_shuffled_images`; both
            0 to 1.

    Raises:
        `ValueError`: when no question has a image.
    """
    questions, places = read_questions(rows)
    load = image_loader(rows, places)
    images = {key: load(key) for key in list(places)[:num_images]}
    asked = [
        {**question, "images": [images[key] for key in question["images"]]}
        for question in questions
        if question["images"] and images.keys() >= set(question["images"])
    ]
    if not asked:
        raise ValueError("No question about images is left to score during training: raise eval_task_images.")
    sides = {"accuracy": asked}
    if len(images) > 1:
        sides["accuracy_shuffled_images"] = with_shuffled_images(asked, seed)
    truths = processor.tokenizer([question["answer"] for question in asked], add_special_tokens=False)["input_ids"]
    longest = max(map(len, truths)) + 8  # an answer that goes on for longer than every truth is wrong by then

    def score(model) -> dict[str, float]:
        training = model.training
        found = {}
        for name, side in sides.items():
            answers = _answer_together(model, processor, side, batch_size, longest)
            found[name] = accuracy_by_kind(side, answers)["all"][0]
        model.train(training)
        return found

    return score


def _answer_together(model, processor, questions: list[dict], *arguments) -> list[str]:
    """As [`answer`], where each process answers its share and gets all answers."""
    state = PartialState()
    shares = [range(rank, len(questions), state.num_processes) for rank in range(state.num_processes)]
    own = [questions[i] for i in shares[state.process_index]]
    answers = gather_object(answer(model, processor, own, *arguments))
    order = [i for share in shares for i in share]
    return [text for _, text in sorted(zip(order, answers, strict=True))]
