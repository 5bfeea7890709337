# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A run over one's own questions: answers are written as they come, and a run that was killed goes on where it was."""

import hashlib
import json
import os
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import align_module_device, gather_object
from datasets import Image, List
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_vtlmm  # noqa: F401 - registers the model

from .answers import (
    accuracy_by_kind,
    answer,
    answer_batch,
    asking_order,
    conversation,
    picture_key,
    split_turns,
    with_shuffled_images,
)
from .prompts import build_prompt


RUN_FILE, ANSWERS_FILE, BLIND_FILE = "run.json", "answers.jsonl", "blind.jsonl"
# What a config says about where it comes from, not about what the model computes
ORIGIN_KEYS = {"_name_or_path", "transformers_version", "_commit_hash", "_from_model_config"}


def load_model(
    name: str, dtype: str = "auto", revision: str | None = None, trust_remote_code: bool = False, **settings
):
    """
    The VT-LMM, or the native twin, of a folder or Hub id, in evaluation mode, and its processor; on the accelerator if
    there is one. A checkpoint that lacks a tensor is refused.

    Args:
        settings: further ones of `from_pretrained`.
    """
    load = {"revision": revision, "trust_remote_code": trust_remote_code}
    processor = AutoProcessor.from_pretrained(name, **load)
    settings = {"device_map": {"": best_device()}} | settings
    model, info = AutoModelForImageTextToText.from_pretrained(
        name, dtype=dtype, output_loading_info=True, **load, **settings
    )
    missing = sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])])
    if missing:  # a native twin would answer, with random numbers there
        raise ValueError(
            f"{name} lacks {len(missing)} tensors of {type(model).__name__}, e.g. {', '.join(missing[:3])}. Answers "
            "would be those of random weights: convert or save it again."
        )
    return model.eval(), processor


def best_device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


# ---- Questions ----


def read_questions(rows, kind: str | None = None, references: str | None = None, row_id: str | None = None):
    r"""
    One question per answered turn, and where each picture is. No picture is decoded or kept.

    Args:
        rows ([`~datasets.Dataset`]): with `messages` and `images`, and the columns that the other arguments name, as
            JSON texts.
        kind (`str`, *optional*): column with the kind of the question, or a list of them, one a turn.
        references (`str`, *optional*): column with all accepted answers, for rows of one question.
        row_id (`str`, *optional*): column by which others know the question.

    Returns:
        `tuple[list[dict], dict]`: questions with `images` (keys), `question`, `answer` (the truth: a text, or the list
        of references), `kind` and `id`; and key to (row, position) of a picture.

    Raises:
        `ValueError`: for rows without an answered question, or a column that does not fit its row.
    """
    questions, places, file_keys = [], {}, {}
    named = {name: column for name, column in {"kind": kind, "answer": references, "id": row_id}.items() if column}
    found = set()
    for index, row in enumerate(rows.cast_column("images", List(Image(decode=False)))):
        keys = []
        for position, image in enumerate(row["images"]):
            path = image["path"] if image["bytes"] is None else None
            key = file_keys.get(path) or picture_key(image)
            if path is not None:
                file_keys[path] = key  # many rows may ask about one file
            places.setdefault(key, (index, position))
            keys.append(key)
        context = row.get("num_context_messages")
        turns = split_turns([{"messages": row["messages"], "images": keys, "num_context_messages": context}])
        columns = {name: json.loads(row[column]) for name, column in named.items()}
        columns = {name: value for name, value in columns.items() if value is not None}
        found |= set(columns)
        for number, turn in enumerate(turns):
            questions.append({**turn, "id": None, **_columns_of_turn(columns, number, len(turns), index)})
    if not questions:
        raise ValueError("No row has a question with an answer: a user's turn and the assistant's after it.")
    if len(found) < len(named):
        raise ValueError(f"No row has a column {next(named[name] for name in named if name not in found)!r}.")
    return questions, places


def _columns_of_turn(columns: dict, number: int, num_turns: int, index: int) -> dict:
    found = {}
    if "kind" in columns:
        kinds = columns["kind"] if isinstance(columns["kind"], list) else [columns["kind"]] * num_turns
        if len(kinds) != num_turns:
            raise ValueError(f"Row {index} has {len(kinds)} kinds for {num_turns} questions.")
        found["kind"] = str(kinds[number])
    if "answer" in columns:
        if num_turns != 1 or not isinstance(columns["answer"], list):
            raise ValueError(f"Row {index}: references must be a list of answers, and the row one question.")
        found["answer"] = [str(answer) for answer in columns["answer"]]
    if "id" in columns:
        found["id"] = columns["id"]
    return found


# ---- What a run is known by ----


def digest(value) -> str:
    """Of anything that JSON can say."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def weights_digest(model) -> str:
    """Of every tensor of the model with its name and type: the same for a copy of the folder, another after a step."""
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        if tensor.is_meta:  # offloaded: its module has it where it runs only
            parent, _, own = name.rpartition(".")
            module = model.get_submodule(parent)
            with align_module_device(module, torch.device("cpu")):
                tensor = getattr(module, own).clone()
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()[:16]


def _without_origin(config):
    if isinstance(config, dict):
        return {key: _without_origin(value) for key, value in config.items() if key not in ORIGIN_KEYS}
    return config


def run_key(
    model, processor, questions: list[dict], prompt: str | None = None, max_new_tokens: int = 128, seed: int = 0
) -> dict:
    r"""
    What answers depend on: two runs with one key give the same answers.

    The batch size is not in it, so that a run that ran out of memory may go on with a smaller one. In float32 it
    changes no answer; in bfloat16 it may tip one that is nearly a tie.

    Args:
        questions (`list[dict]`): as [`read_questions`] gives them.
        prompt (`str`, *optional*): name in `prompts.ENDINGS`; by default a question is asked as it stands.
        max_new_tokens (`int`, *optional*, defaults to 128): longest answer.
        seed (`int`, *optional*, defaults to 0): of the shuffled pictures.
    """
    asked = with_prompt(questions, prompt)
    texts = processor.apply_chat_template(
        [conversation({**question, "images": [None] * len(question["images"])}) for question in asked],
        add_generation_prompt=True,
        tokenize=False,
    )
    configs = [model.config.to_dict(), model.generation_config.to_dict(), processor.image_processor.to_dict()]
    return {
        "weights": weights_digest(model),
        "configuration": digest([_without_origin(config) for config in configs]),
        "prompts": digest(processor.tokenizer(texts, add_special_tokens=False)["input_ids"]),
        "rows": digest(questions),
        "settings": {
            "prompt": prompt,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
    }


def with_prompt(questions: list[dict], prompt: str | None) -> list[dict]:
    if prompt is None:
        return questions
    return [{**question, "question": build_prompt(prompt, question["question"])} for question in questions]


def open_run(path: Path, answers: list[Path], key: dict, about: dict) -> None:
    r"""
    Writes the file `path`, which says whose the `answers` beside it are, or finds it as it was left.

    Raises:
        `ValueError`: when they are of another run; it says what differs.
    """
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))["key"]
        differing = [name for name in key if found.get(name) != key[name]]
        if differing:
            raise ValueError(
                f"{answers[0]} holds answers of another run ({', '.join(differing)} differ): choose another --output, "
                f"or delete it and {path.name}. Answers of two runs are never mixed."
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if any(file.exists() for file in answers):
        raise ValueError(f"{answers[0]} is there, but no {path.name} that says whose: choose another --output.")
    draft = path.with_suffix(".part")  # a kill while it is written leaves no half of it
    draft.write_text(json.dumps({"key": key, **about}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)


# ---- Answers ----


def finished_answers(path: Path) -> list[tuple[dict, int]]:
    """The records of a file of answers, each with the number of bytes up to its end; half a line is none."""
    records, end = [], 0
    for line in (path.read_bytes() if path.is_file() else b"").split(b"\n")[:-1]:
        end += len(line) + 1
        records.append((json.loads(line), end))
    return records


def answer_all(path: Path, model, processor, questions: list[dict], load_picture, batch_size, max_new_tokens):
    r"""
    Answers every question that has none in the file `path` yet, and appends a batch as soon as it is answered.

    Batches begin where they would without a stop, so that a resumed run computes the very same.

    Args:
        questions (`list[dict]`): `images` are keys.
        load_picture (callable): key to picture from PIL.

    Returns:
        `list[str]`: all answers, in the order of `questions`.

    Raises:
        `ValueError`: for a file of other questions.
    """
    order = asking_order(questions)
    finished = finished_answers(path)
    if [record["index"] for record, _ in finished] != order[: len(finished)]:
        raise ValueError(f"{path} does not fit its run: it was changed by hand. Delete it.")
    if len(finished) < len(order):
        finished = finished[: len(finished) // batch_size * batch_size]
    answers = {record["index"]: record["answer"] for record, _ in finished}
    with open(path, "ab") as file, tqdm(total=len(order), initial=len(finished), desc=path.stem) as progress:
        file.truncate(finished[-1][1] if finished else 0)
        for start in range(len(finished), len(order), batch_size):
            batch = order[start : start + batch_size]
            asked = [{**questions[i], "images": [load_picture(key) for key in questions[i]["images"]]} for i in batch]
            texts = answer_batch(model, processor, asked, max_new_tokens)
            lines = []
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text
                question = questions[i]
                truth = {"truth": question["answer"]} if "answer" in question else {}
                record = {"index": i, **question, **truth, "answer": text}
                lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            file.write("".join(lines).encode())
            file.flush()
            progress.update(len(batch))
    return [answers[i] for i in range(len(questions))]


def picture_loader(rows, places: dict):
    """Function of a picture's key that reads it from `rows`; in RGB, as the training does."""

    def load(key: str):
        row, position = places[key]
        return rows[row]["images"][position].convert("RGB")

    return load


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
    Answers with the right pictures and with shuffled ones, into the folder `output`; goes on with a run that is there.

    Args:
        rows, questions, places: see [`read_questions`].
        key (`dict`): of [`run_key`]; how to ask is in its settings.
        about (`dict`, *optional*): what else `run.json` shall say.

    Returns:
        `tuple[list[str], list[str] | None]`: answers and those of the blind control, which there is not without two
        different pictures.

    Raises:
        `ValueError`: when `output` holds another run.
    """
    output, settings = Path(output), key["settings"]
    about = {**(about or {}), "num_questions": len(questions)}
    open_run(output / RUN_FILE, [output / ANSWERS_FILE, output / BLIND_FILE], key, about)
    asked = with_prompt(questions, settings["prompt"])
    arguments = (picture_loader(rows, places), batch_size, settings["max_new_tokens"])
    answers = answer_all(output / ANSWERS_FILE, model, processor, asked, *arguments)
    if len(places) < 2:
        return answers, None
    control = with_shuffled_images(asked, settings["seed"])
    return answers, answer_all(output / BLIND_FILE, model, processor, control, *arguments)


# ---- During training ----


def task_scores(rows, processor, num_pictures: int, batch_size: int = 8, seed: int = 0):
    r"""
    A function that answers the questions about the first pictures of `rows` and scores them by exact match.

    It draws no random number and leaves the model in the mode that it found, so training goes on as without it.
    Several processes share the questions, and each gets the scores over all of them.

    Args:
        rows ([`~datasets.Dataset`]): see [`read_questions`].
        num_pictures (`int`): so many different pictures; they are kept decoded.
        seed (`int`, *optional*, defaults to 0): of the shuffled pictures.

    Returns:
        callable: model to `dict` with `accuracy` and, where there are two pictures or more, `accuracy_shuffled`; both
            0 to 1.

    Raises:
        `ValueError`: when no question has a picture.
    """
    questions, places = read_questions(rows)
    load = picture_loader(rows, places)
    images = {key: load(key) for key in list(places)[:num_pictures]}
    asked = [
        {**question, "images": [images[key] for key in question["images"]]}
        for question in questions
        if question["images"] and images.keys() >= set(question["images"])
    ]
    if not asked:
        raise ValueError("No question about pictures is left to score during training: raise eval_task_pictures.")
    sides = {"accuracy": asked}
    if len(images) > 1:
        sides["accuracy_shuffled"] = with_shuffled_images(asked, seed)
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
