# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Answer questions into a file that an interrupted run resumes."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import find_executable_batch_size
from tqdm.auto import tqdm

from vtlmm.data.encoding import position_limit
from vtlmm.data.json_files import read_json, require_type
from vtlmm.data.output_files import json_text, write_json
from vtlmm.data.row_checker import image_tokens_per_image
from vtlmm.hub.weights_digest import weights_digest

from .batch_inputs import VisionFeatures
from .generation import Answer, answer_order, conversation, generate_batch
from .prompt_encoding import Prompt, encode_prompt
from .shared_prefix import SharedPrefixes


# Config keys that do not change what the model computes
ORIGIN_KEYS = {"_name_or_path", "transformers_version", "_commit_hash", "_from_model_config"}
AUTO_BATCH_SIZES = (64, 32, 16, 8, 4, 2, 1)  # tried in this order until a batch fits into memory


# ---- Identity of a run ----


def digest(value: Any) -> str:
    """Return a short SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _without_origin(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without_origin(value) for key, value in config.items() if key not in ORIGIN_KEYS}
    return config


def run_key(
    model,
    processor,
    questions: list[dict[str, Any]],
    prompt: str | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> dict[str, Any]:
    r"""
    Return everything that answers depend on. Two runs with equal keys give the same answers.

    The batch size is not part of the key, so a run that ran out of memory can resume with a smaller batch. In float32
    it changes no answer. In bfloat16 it may change an answer whose two likeliest tokens are almost equal.

    Args:
        questions (`list[dict]`): questions with their prompts.
        prompt (`str`, *optional*): benchmark of the prompt.
        max_new_tokens (`int`, *optional*, defaults to 128): longest answer.
        seed (`int`, *optional*, defaults to 0): seed of the shuffled images.

    Raises:
        `ValueError`: for a question that the chat template rejects or that is longer than the decoder's position
            limit. It names the row.
    """
    configs = [model.config.to_dict(), model.generation_config.to_dict(), processor.image_processor.to_dict()]
    return {
        "weights": weights_digest(model),
        "configuration": digest([_without_origin(config) for config in configs]),
        "prompts": digest(encode_questions(model, processor, questions)),
        "rows": digest([{k: v for k, v in question.items() if k != "question"} for question in questions]),
        "settings": {
            "prompt": prompt,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
    }


def encode_questions(model, processor, questions: list[dict[str, Any]]) -> list[list[int]]:
    """Return the token ids of each prompt with one token for each image. Raises as [`run_key`] does."""
    limit = position_limit(model.config)
    num_image_tokens = image_tokens_per_image(processor) if any(q["images"] for q in questions) else 0
    prompts = []
    for question in questions:
        where = f"Row {question['row']}, question {question['question'][:60]!r}"
        try:
            ids = encode_prompt(processor, conversation({**question, "images": [None] * len(question["images"])}))
        except Exception as error:  # chat templates raise any type of error
            raise ValueError(f"{where}: {error}") from error
        length = len(ids) + len(question["images"]) * (num_image_tokens - 1)
        if limit is not None and length >= limit:
            raise ValueError(
                f"{where} has {length} tokens with its images, but the decoder has {limit} positions. Shorten the "
                "question or use fewer images."
            )
        prompts.append(ids)
    return prompts


def open_run(path: Path, answers: list[Path], key: dict[str, Any], about: dict[str, Any]) -> None:
    r"""
    Write the file `path` that identifies the run of the `answers` next to it, or check that it is the same run.

    Raises:
        `ValueError`: if the answers are of another run. It lists what differs.
    """
    if path.is_file():
        saved = read_json(path, entries={"key": dict})["key"]
        differing = [name for name in key if saved.get(name) != key[name]]
        if differing:
            raise ValueError(
                f"{answers[0]} holds answers of another run ({', '.join(differing)} differ). Choose another output, "
                f"or delete {answers[0].name} and {path.name}."
            )
        return
    if any(file.exists() for file in answers):
        raise ValueError(
            f"{answers[0]} exists, but {path.name}, which identifies its run, does not. Choose another "
            "output, or delete it."
        )
    write_json(path, {"key": key, **about})


# ---- The file of answers ----


def finished_answers(path: Path) -> list[tuple[dict[str, Any], int]]:
    """
    Return the records of a file of answers, each with the byte offset of its end. A cut last line is ignored.

    Raises:
        `ValueError`: for another line that is not a record.
    """
    records, end = [], 0
    for number, line in enumerate((path.read_bytes() if path.is_file() else b"").split(b"\n")[:-1], 1):
        end += len(line) + 1
        name = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name} is not JSON: {error}. Delete the file to answer its questions again.") from error
        records.append((require_type(record, dict, name, {"index": int, "answer": str}), end))
    return records


def answer_all(
    path: Path,
    model,
    processor,
    questions: list[dict[str, Any]],
    load_image: Callable,
    batch_size: int | Literal["auto"],
    max_new_tokens: int,
    vision_features: VisionFeatures | None = None,
) -> list[dict[str, Any]]:
    r"""
    Answer every question that has no answer in the file `path`. Each batch is appended when it is answered.

    Batches start where they would without an interruption, so a resumed run computes the same answers.

    Args:
        questions (`list[dict]`): `images` are keys.
        load_image (`Callable`): image key to image.
        batch_size (`int` or `"auto"`): questions per forward pass. `"auto"` starts with 64, and halves it when the
            memory of the device is too small.
        vision_features ([`VisionFeatures`], *optional*): shared with other calls, so that the vision tower encodes
            each image once.

    Returns:
        `list[dict]`: the lines of the file in the order of `questions`: `index`, the question, its `truth` if it is
            known, the `answer`, and the `probability` of the whole answer.

    Raises:
        `ValueError`: for a file with answers to other questions.
    """
    all_prompts = [Prompt(conversation(question), question["images"]) for question in questions]
    order, features = answer_order(all_prompts), VisionFeatures() if vision_features is None else vision_features
    shared: dict[str, Any] = {"vision_features": features, "prefixes": SharedPrefixes(all_prompts)}
    finished = finished_answers(path)
    if [record["index"] for record, _ in finished] != order[: len(finished)]:
        raise ValueError(f"The answers in {path} are not in the order of its run. Delete the file.")
    if len(finished) < len(order) and batch_size != "auto":
        finished = finished[: len(finished) // batch_size * batch_size]
    answers = {record["index"]: record for record, _ in finished}
    with open(path, "ab") as file, tqdm(total=len(order), initial=len(finished), desc=path.stem) as progress:
        file.truncate(finished[-1][1] if finished else 0)

        def answer_rest(size: int) -> None:
            for start in range(len(answers), len(order), size):
                batch = order[start : start + size]
                prompts = [all_prompts[i] for i in batch]
                generated = generate_batch(
                    model, processor, prompts, load_image, max_new_tokens=max_new_tokens, **shared
                )
                records = {i: _record(i, questions[i], answer) for i, answer in zip(batch, generated, strict=True)}
                file.write("".join(json_text(record) + "\n" for record in records.values()).encode())
                file.flush()
                answers.update(records)
                progress.update(len(batch))

        _with_batch_size(answer_rest, batch_size)
    return [answers[i] for i in range(len(questions))]


def _with_batch_size(answer_rest: Callable[[int], None], batch_size: int | Literal["auto"]) -> None:
    """Call `answer_rest` with a batch size; for `"auto"` again with a smaller one if the memory is too small."""
    if batch_size == "auto":
        largest, *smaller = AUTO_BATCH_SIZES
        sizes = iter([*smaller, 0])
        find_executable_batch_size(answer_rest, largest, lambda: next(sizes))()
    else:
        answer_rest(batch_size)


def _record(index: int, question: dict[str, Any], answer: Answer) -> dict[str, Any]:
    truth = {"truth": question["answer"]} if "answer" in question else {}
    probability = round(math.exp(answer.log_probability), 4)
    return {"index": index, **question, **truth, "answer": answer.text, "probability": probability}
