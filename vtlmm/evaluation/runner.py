# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Evaluate a model on a dataset. Answers are saved when they are generated; an interrupted run resumes."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from accelerate.state import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedConfig

from vtlmm.data.data_report import Problem
from vtlmm.data.encoding import position_limit
from vtlmm.data.environment import package_versions
from vtlmm.data.output_files import one_writer, require_other_place
from vtlmm.data.rows import load_rows
from vtlmm.data.setting_values import require_batch_size, require_integers
from vtlmm.data.validation import check_rows
from vtlmm.inference.batch_inputs import VisionFeatures
from vtlmm.inference.generation import conversation, generate_answers
from vtlmm.inference.prompt_encoding import Prompt
from vtlmm.inference.resumable import answer_all, open_run, run_key

from .answers_dataset import answers_dataset
from .prompts import MAX_NEW_TOKENS, build_prompt, check_prompt
from .questions import ImagePositions, image_loader, read_questions, with_prompt
from .report import format_table, write_report
from .scorers import accuracy_by_kind, score_answers, summarize
from .shuffled_images import with_shuffled_images
from .submissions import SUBMISSION_IDS, check_submission, write_submission


RUN_FILE, ANSWERS_FILE, SHUFFLED_FILE = "run.json", "answers.jsonl", "answers_shuffled_images.jsonl"
LOCK_FILE = ".vtlmm.lock"
PACKAGES = ("vtlmm", "torch", "transformers")  # whose versions are recorded


@dataclass
class EvaluationResult:
    r"""
    Result of [`evaluate`].

    Attributes:
        kinds (`list[dict]`): a line for each kind of question and for `"all"`: `n`, `images`, `score` with its 95 %
            interval `low` and `high`, and `score_shuffled_images`, `low_shuffled_images`, `high_shuffled_images`.
        summary (`dict`, *optional*): what the benchmark of the scorer reports in addition to the mean.
        answers, answers_shuffled_images (`list[str]`): in the order of the questions. `answers_shuffled_images` is
            None if the dataset has fewer than two different images.
        num_rows, num_questions (`int`): rows that were read, and questions that were answered.
        skipped (`list[Problem]`): the problems of the rows that were left out.
        subset (`str`, *optional*): which part of the dataset was used, if not all.
        submission (`Path`, *optional*): file for the benchmark's server.
        to_dataset (`Callable[[], Dataset]`): returns the questions with images, ground truth, answers and scores, see
            [`answers_dataset`]. `result.to_dataset().push_to_hub("user/name")` publishes them.
    """

    kinds: list[dict[str, Any]]
    summary: dict[str, Any] | None
    answers: list[str]
    answers_shuffled_images: list[str] | None
    num_rows: int
    num_questions: int
    skipped: list[Problem] = field(default_factory=list)
    subset: str | None = None
    submission: Path | None = None
    to_dataset: Callable[[], Dataset] = field(kw_only=True, repr=False, compare=False)

    def to_markdown(self) -> str:
        """Return the table of scores, and how many rows were read and left out."""
        lines = [f"SUBSET: {self.subset}", ""] if self.subset else []
        lines += [format_table(self.kinds), "", f"{self.num_rows} rows read, {self.num_questions} questions answered."]
        if self.skipped:
            number = len({problem.row for problem in self.skipped})
            reasons = Counter(problem.kind for problem in self.skipped)
            lines.append(f"{number} rows left out: {', '.join(f'{kind} ({n})' for kind, n in reasons.items())}.")
        if self.summary:
            lines += ["", *(f"{name}: {value}" for name, value in self.summary.items())]
        return "\n".join(lines)


def evaluate(
    model,
    processor,
    dataset: str | os.PathLike | Dataset | list[dict],
    *,
    output: str | os.PathLike | None = None,
    image_folder: str | os.PathLike | None = None,
    split: str = "train",
    columns: Mapping[str, Any] | None = None,
    kind: str | None = None,
    references: str | None = None,
    row_id: str | None = None,
    scorer: str = "exact",
    prompt: str | None = None,
    submission: str | None = None,
    bad_rows: Literal["raise", "skip"] = "raise",
    limit: int | None = None,
    batch_size: int | Literal["auto"] = 8,
    max_new_tokens: int | None = None,
    seed: int = 0,
    name: str | None = None,
) -> EvaluationResult:
    r"""
    Answer and score the questions of a dataset, with their own images and with shuffled images.

    All rows and images are checked before the first answer.

    Args:
        model, processor: see [`load_model`].
        dataset, image_folder, split, columns: as for training, or rows in memory; see [`load_rows`].
        output: folder for answers, tables and a page of samples. An interrupted run resumes there.
        kind, references, row_id: columns with the kind of a question, its accepted answers and its id.
        scorer: a name in [`SCORERS`].
        prompt: benchmark whose prompt ending is added, as in LLaVA.
        submission: `vqav2`, `vizwiz` or `mmbench`; its submission file is written to `output`. It needs `row_id`.
        bad_rows, limit: `"skip"` leaves out invalid rows; use the first rows only. The result reports both.
        batch_size: questions per forward pass, or `"auto"`, see [`answer_all`].
        max_new_tokens: longest answer, by default LLaVA's for `prompt` or 128.
        seed, name: seed of the shuffled images; name of the model in the results.

    Raises:
        `ValueError`: for invalid rows or images, a scorer that does not fit the rows, an `output` of another run, or
            another process that writes to `output`.
    """
    _check_settings(prompt, submission, row_id, output, bad_rows)
    require_other_place(output, dataset=dataset, image_folder=image_folder)
    _check_numbers(limit, batch_size, max_new_tokens, seed)
    load = {"image_folder": image_folder, "split": split, "columns": columns}
    room = _room_for_question(model, processor, prompt)
    data = _read_data(dataset, load, processor, (kind, references, row_id), bad_rows, limit, room)
    data.check_scoring(scorer, submission)
    prompts = with_prompt(data.questions, prompt)
    key = run_key(model, processor, prompts, prompt, max_new_tokens or MAX_NEW_TOKENS.get(prompt or "", 128), seed)
    about = {"model": name or model.name_or_path, "split": split, **data.about()}
    with TemporaryDirectory() as temporary:
        folder = Path(output or temporary)
        with one_writer(folder / LOCK_FILE, folder):
            arguments = (data.rows, prompts, data.image_positions, folder, key, batch_size, about)
            records = run_questions(model, processor, *arguments)
            return _report(data, prompts, *records, scorer, submission, folder, {**about, "key": key})


@dataclass
class _EvaluationData:
    """The questions of a dataset. `rows` are its valid rows, and `skipped` are the problems of the others."""

    name: str
    rows: Dataset
    questions: list[dict[str, Any]]
    image_positions: ImagePositions
    num_rows: int
    subset: str | None
    skipped: list[Problem]

    def about(self) -> dict[str, Any]:
        """Return the entries of `run.json` and `results.json` about the data."""
        numbers = {"num_rows": self.num_rows, "num_questions": len(self.questions)}
        return {"data": self.name, "subset": self.subset, **numbers}

    def check_scoring(self, scorer: str, submission: str | None) -> None:
        """Find a scorer or a submission that does not fit the questions before the first answer."""
        for check in (score_answers, summarize):
            check(self.questions, [""] * len(self.questions), scorer)
        if submission:
            check_submission(submission, self.questions, self.subset)


def _read_data(
    dataset,
    load: dict[str, Any],
    processor,
    columns: tuple[str | None, str | None, str | None],
    bad_rows: str,
    limit: int | None,
    max_positions: int | None,
) -> _EvaluationData:
    """Read the questions and check their rows; `columns` are those of kind, references and id."""
    rows = load_rows(dataset, keep_columns=[c for c in columns if c], **load)
    num_rows, subset = len(rows), None
    if limit is not None and limit < num_rows:
        rows, subset = rows.select(range(limit)), f"the first {limit} of {num_rows} rows"
        num_rows = limit
    report = check_rows(rows, processor, require_marks=False, max_positions=max_positions)
    if bad_rows == "raise" or not report.good_rows:
        report.raise_for_problems(advice="Fix them, or set `bad_rows` to 'skip' to evaluate the other rows.")
    rows = rows.select(report.good_rows)
    questions, image_positions = read_questions(rows, *columns, report.good_rows)
    name = os.fspath(dataset) if isinstance(dataset, str | os.PathLike) else "rows in memory"
    return _EvaluationData(name, rows, questions, image_positions, num_rows, subset, report.problems)


def _report(
    data: _EvaluationData,
    prompts: list[dict[str, Any]],
    records: list[dict[str, Any]],
    shuffled_records: list[dict[str, Any]] | None,
    scorer: str,
    submission: str | None,
    folder: Path,
    about: dict[str, Any],
) -> EvaluationResult:
    """Write the tables, samples and submission into `folder`, and return the result."""
    answers = [record["answer"] for record in records]
    shuffled = None if shuffled_records is None else [record["answer"] for record in shuffled_records]
    probabilities = [record.get("probability") for record in records]
    about |= {"skipped": [str(problem) for problem in data.skipped], "versions": package_versions(PACKAGES)}
    load_image = image_loader(data.rows, data.image_positions)
    arguments = (prompts, answers, shuffled, probabilities, scorer, load_image, about)
    results = write_report(folder, data.questions, *arguments)
    file = write_submission(folder, submission, data.questions, answers) if submission else None
    return EvaluationResult(
        kinds=results["kinds"],
        summary=results["summary"],
        answers=answers,
        answers_shuffled_images=shuffled,
        num_rows=data.num_rows,
        num_questions=len(data.questions),
        skipped=data.skipped,
        subset=data.subset,
        submission=file,
        to_dataset=partial(
            answers_dataset, data.rows, data.image_positions, data.questions, records, shuffled_records, scorer
        ),
    )


def _check_settings(prompt: str | None, submission: str | None, row_id: str | None, output, bad_rows: str) -> None:
    check_prompt(prompt)
    if submission is not None and submission not in SUBMISSION_IDS:
        raise ValueError(f"Unknown submission {submission!r}. Choose one of {', '.join(SUBMISSION_IDS)}.")
    if submission is not None and row_id is None:
        column = SUBMISSION_IDS[submission]
        raise ValueError(f"A submission to {submission} needs the ids: set `row_id` (--id), e.g. to {column}.")
    if submission is not None and output is None:
        raise ValueError("A submission needs `output`, the folder for its file.")
    if bad_rows not in ("raise", "skip"):
        raise ValueError(f"`bad_rows` is {bad_rows!r}. It must be 'raise' or 'skip'.")


def _check_numbers(
    limit: int | None, batch_size: int | Literal["auto"], max_new_tokens: int | None, seed: int
) -> None:
    require_integers(limit=limit, max_new_tokens=max_new_tokens)
    require_batch_size(batch_size)
    require_integers(0, seed=seed)


def _room_for_question(model, processor, prompt: str | None) -> int | None:
    """Return the number of positions of the decoder without the ending of a benchmark's prompt."""
    ending = processor.tokenizer(build_prompt(prompt, ""), add_special_tokens=False)["input_ids"]
    limit = position_limit(model.config)
    return None if limit is None else max(1, limit - len(ending))


def run_questions(
    model,
    processor,
    rows: Dataset,
    prompts: list[dict[str, Any]],
    image_positions: ImagePositions,
    output: str | Path,
    key: dict[str, Any],
    batch_size: int | Literal["auto"] = 8,
    about: dict[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    r"""
    Answer questions with their images and with shuffled images into the folder `output`, or resume there.

    Args:
        rows, image_positions: see [`read_questions`].
        prompts (`list[dict]`): questions with the ending of their prompt.
        key (`dict`): result of [`run_key`].
        about (`dict`, *optional*): further entries of `run.json`.

    Returns:
        `tuple[list[dict], list[dict] | None]`: the results of [`answer_all`] with the images, and with shuffled
        images; None without two different images.

    Raises:
        `ValueError`: if `output` holds another run.
    """
    folder, settings = Path(output), key["settings"]
    files = (folder / ANSWERS_FILE, folder / SHUFFLED_FILE)
    open_run(folder / RUN_FILE, list(files), key, about or {})
    # Both runs share the features, so the vision tower encodes each image once
    arguments = (image_loader(rows, image_positions), batch_size, settings["max_new_tokens"], VisionFeatures())
    answers = answer_all(files[0], model, processor, prompts, *arguments)
    if len(image_positions) < 2:
        return answers, None
    shuffled = with_shuffled_images(prompts, settings["seed"])
    return answers, answer_all(files[1], model, processor, shuffled, *arguments)


# ---- During training ----


def task_scores(
    rows: Dataset,
    processor,
    num_images: int,
    batch_size: int = 8,
    seed: int = 0,
    config: PreTrainedConfig | None = None,
) -> Callable[[Any], dict[str, float]]:
    r"""
    Return a function that answers the questions about the first images of `rows` and scores them by exact match.

    The function draws no random number and restores the mode of the model, so it does not change the training. Several
    processes share the questions, and each process gets the scores over all of them.

    Args:
        rows ([`~datasets.Dataset`]): see [`read_questions`].
        num_images (`int`): number of different images; they are kept in memory.
        batch_size (`int`, *optional*, defaults to 8), seed (`int`, *optional*, defaults to 0): the seed is of the
            shuffled images.
        config (`PreTrainedConfig`, *optional*): config of the model, whose positions limit the rows.

    Returns:
        `Callable`: model to `dict` with `accuracy` and, with at least two images, `accuracy_shuffled_images`, 0 to 1.

    Raises:
        `ValueError`: for invalid rows or images, and if no question has an image.
    """
    require_integers(num_images=num_images, batch_size=batch_size)
    limit = None if config is None else position_limit(config)
    report = check_rows(rows, processor, require_marks=False, max_positions=limit)
    report.raise_for_problems(advice="Fix these rows of `eval_task_data`.")
    questions, image_positions = read_questions(rows)
    load = image_loader(rows, image_positions)
    images = {key: load(key) for key in list(image_positions)[:num_images]}
    asked = [q for q in questions if q["images"] and images.keys() >= set(q["images"])]
    if not asked:
        raise ValueError("No question about images is left to score during training. Raise `eval_task_images`.")
    question_sets = {"accuracy": asked}
    if len(images) > 1:
        question_sets["accuracy_shuffled_images"] = with_shuffled_images(asked, seed)
    truths = processor.tokenizer([question["answer"] for question in asked], add_special_tokens=False)["input_ids"]
    longest = max(map(len, truths)) + 8  # an answer that is longer than every ground truth is wrong

    def score(model) -> dict[str, float]:
        training, features = model.training, VisionFeatures()  # shared: each image is encoded once
        scores = {}
        for name, questions in question_sets.items():
            answers = _answer_together(model, processor, questions, images, features, batch_size, longest)
            scores[name] = accuracy_by_kind(questions, answers)["all"][0]
        model.train(training)
        return scores

    return score


def _answer_together(
    model,
    processor,
    questions: Sequence[dict[str, Any]],
    images: dict[str, Any],
    features: VisionFeatures,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Return all answers. Each process answers its share of the questions."""
    state = PartialState()
    shares = [range(rank, len(questions), state.num_processes) for rank in range(state.num_processes)]
    prompts = [
        Prompt(conversation(question), question["images"])
        for question in (questions[i] for i in shares[state.process_index])
    ]
    answers = generate_answers(
        model,
        processor,
        prompts,
        images.__getitem__,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        vision_features=features,
    )
    texts = gather_object([answer.text for answer in answers])
    order = [i for share in shares for i in share]
    return [text for _, text in sorted(zip(order, texts, strict=True))]
