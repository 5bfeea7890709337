# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A run over one's own questions: answers are written as they come, and a run that was killed goes on where it was."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import gather_object

from vtlmm.data.rows import load_rows
from vtlmm.data.validation import check_rows
from vtlmm.inference.generation import VisionFeatures, accuracy_by_kind, answer, with_shuffled_images
from vtlmm.inference.resumable import answer_all, open_run, run_key

from .prompts import MAX_NEW_TOKENS, build_prompt
from .questions import image_loader, read_questions, with_prompt
from .report import format_table, score_answers, summarize, write_report


RUN_FILE, ANSWERS_FILE, BLIND_FILE = "run.json", "answers.jsonl", "blind.jsonl"


@dataclass
class EvaluationResult:
    r"""
    Result of [`evaluate`].

    Attributes:
        kinds (`list[dict]`): a line for each kind of question and one for `"all"`: `n`, `score` with its 95 % interval
            `low` and `high`, and the same of the control with shuffled images.
        summary (`dict`, *optional*): what the benchmark of the scorer reports beside the mean.
        answers, shuffled_answers (`list[str]`): in the order of the questions. `shuffled_answers` is None if the
            dataset has fewer than two different images.
        num_rows, num_questions (`int`)
        subset (`str`, *optional*): which part of the data was used, if not all.
    """

    kinds: list[dict[str, Any]]
    summary: dict[str, Any] | None
    answers: list[str]
    shuffled_answers: list[str] | None
    num_rows: int
    num_questions: int
    subset: str | None = None

    def format(self) -> str:
        """Return the table in Markdown."""
        lines = [f"SUBSET: {self.subset}", ""] if self.subset else []
        return "\n".join([*lines, format_table(self.kinds), f"{self.num_rows} rows, {self.num_questions} questions"])


def evaluate(
    model,
    processor,
    dataset: str | Path,
    *,
    output: str | Path | None = None,
    image_folder: str | Path | None = None,
    split: str = "train",
    kind: str | None = None,
    references: str | None = None,
    row_id: str | None = None,
    scorer: str = "exact",
    prompt: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    seed: int = 0,
    name: str | None = None,
) -> EvaluationResult:
    r"""
    Answer and score the questions of a dataset, with their own images and with shuffled images.

    All rows and images are checked before the first answer.

    Args:
        model, processor: see [`load_model`].
        dataset (`str`): file, folder or Hub id, as for training.
        output (`str`, *optional*): folder for answers, tables and a page of samples. An interrupted run resumes there.
        image_folder, split (*optional*): see [`load_rows`].
        kind, references, row_id (`str`, *optional*): columns with the kind of a question, its accepted answers and
            its id.
        scorer (`str`, *optional*, defaults to `"exact"`): a name in [`SCORERS`].
        prompt (`str`, *optional*): benchmark whose prompt ending is added, as in LLaVA.
        limit (`int`, *optional*): use the first rows only.
        batch_size (`int`, *optional*, defaults to 8): questions per forward pass.
        max_new_tokens (`int`, *optional*): longest answer in tokens; by default LLaVA's for `prompt`, otherwise 128.
        seed (`int`, *optional*, defaults to 0): seed of the shuffled images.
        name (`str`, *optional*): name of the model in the results.

    Returns:
        [`EvaluationResult`]

    Raises:
        `ValueError`: for invalid rows or images, a scorer that does not fit the rows, or an `output` of another run.
    """
    if prompt is not None:
        build_prompt(prompt, "")
    keep = [column for column in (kind, references, row_id) if column]
    rows = load_rows(str(dataset), image_folder=image_folder, split=split, keep_columns=keep)
    subset = None
    if limit is not None and limit < len(rows):
        rows, subset = rows.select(range(limit)), f"the first {limit} of {len(rows)} rows"
    check_rows(rows, processor).raise_for_problems()
    questions, places = read_questions(rows, kind, references, row_id)
    for check in (score_answers, summarize):  # find a scorer that does not fit before the first answer
        check(questions, [""] * len(questions), scorer)
    asked = with_prompt(questions, prompt)
    longest = max_new_tokens or MAX_NEW_TOKENS.get(prompt or "", 128)
    key = run_key(model, processor, asked, prompt, longest, seed)
    about: dict[str, Any] = {"model": name or model.name_or_path, "data": str(dataset), "split": split}
    about["subset"] = subset
    with TemporaryDirectory() as temporary:
        folder = Path(output or temporary)
        answers, shuffled = run_questions(model, processor, rows, questions, places, folder, key, batch_size, about)
        about |= {"num_questions": len(questions), "num_rows": len(rows), "key": key}
        about["versions"] = {package: version(package) for package in ("vtlmm", "torch", "transformers")}
        results = write_report(folder, asked, answers, shuffled, scorer, image_loader(rows, places), about)
    return EvaluationResult(results["kinds"], results["summary"], answers, shuffled, len(rows), len(questions), subset)


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
    # Both runs share the features, so the vision tower encodes each image once
    arguments = (image_loader(rows, places), batch_size, settings["max_new_tokens"], VisionFeatures())
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
