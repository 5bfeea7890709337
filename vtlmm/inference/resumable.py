# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Answer questions into a file that an interrupted run resumes."""

import hashlib
import json
import os
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from tqdm.auto import tqdm

from .generation import VisionFeatures, conversation, generate_batch
from .prompt_encoding import Prompt


def asking_order(questions: list[dict]) -> list[int]:
    return sorted(range(len(questions)), key=lambda i: (len(questions[i]["images"]), len(questions[i]["question"])))


# What a config says about where it comes from, not about what the model computes
ORIGIN_KEYS = {"_name_or_path", "transformers_version", "_commit_hash", "_from_model_config"}


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
        questions (`list[dict]`): as they are asked, with the wording that `prompt` names.
        prompt (`str`, *optional*): name of the wording, for the record.
        max_new_tokens (`int`, *optional*, defaults to 128): longest answer.
        seed (`int`, *optional*, defaults to 0): of the shuffled images.
    """
    texts = processor.apply_chat_template(
        [conversation({**question, "images": [None] * len(question["images"])}) for question in questions],
        add_generation_prompt=True,
        tokenize=False,
    )
    configs = [model.config.to_dict(), model.generation_config.to_dict(), processor.image_processor.to_dict()]
    return {
        "weights": weights_digest(model),
        "configuration": digest([_without_origin(config) for config in configs]),
        "prompts": digest(processor.tokenizer(texts, add_special_tokens=False)["input_ids"]),
        "rows": digest([{k: v for k, v in question.items() if k != "question"} for question in questions]),
        "settings": {
            "prompt": prompt,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "device": model.device.type,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
    }


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


def finished_answers(path: Path) -> list[tuple[dict, int]]:
    """The records of a file of answers, each with the number of bytes up to its end; half a line is none."""
    records, end = [], 0
    for line in (path.read_bytes() if path.is_file() else b"").split(b"\n")[:-1]:
        end += len(line) + 1
        records.append((json.loads(line), end))
    return records


def answer_all(
    path: Path,
    model,
    processor,
    questions: list[dict],
    load_image,
    batch_size: int,
    max_new_tokens: int,
    vision_features: VisionFeatures | None = None,
) -> list[str]:
    r"""
    Answers every question that has none in the file `path` yet, and appends a batch as soon as it is answered.

    Batches begin where they would without a stop, so that a resumed run computes the very same.

    Args:
        questions (`list[dict]`): `images` are keys.
        load_image (callable): image key to image.
        vision_features ([`VisionFeatures`], *optional*): shared with other calls, so that the vision tower encodes
            each image once.

    Returns:
        `list[str]`: all answers, in the order of `questions`.

    Raises:
        `ValueError`: for a file of other questions.
    """
    order, features = asking_order(questions), VisionFeatures() if vision_features is None else vision_features
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
            prompts = [Prompt(conversation(questions[i]), questions[i]["images"]) for i in batch]
            found = generate_batch(
                model,
                processor,
                prompts,
                load_image,
                max_new_tokens=max_new_tokens,
                vision_features=features,
            )
            texts = [answer.text for answer in found]
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
