# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Answers to questions about pictures, scored by exact match, beside the blind control."""

import random
from collections import defaultdict

import torch
from tqdm.auto import tqdm


def split_turns(rows) -> list[dict]:
    """
    One question per row: each answered turn of a conversation becomes a row of its own, without the turns before it.

    Args:
        rows: rows with `messages` and `images` as `load_rows` gives them; `kind` is kept if there is one. The image
            parts of a conversation go with every question.

    Returns:
        `list[dict]` with `images`, `question`, `answer` and `kind`.
    """
    questions = []
    for row in rows:
        texts = [("".join(part["text"] or "" for part in m["content"]), m["role"]) for m in row["messages"]]
        for (question, role), (answer, next_role) in zip(texts, texts[1:], strict=False):
            if (role, next_role) == ("user", "assistant"):
                questions.append(
                    {"images": row["images"], "question": question, "answer": answer, "kind": row.get("kind", "all")}
                )
    return questions


def with_shuffled_images(questions: list[dict], seed: int = 0) -> list[dict]:
    """The blind control: every question gets the pictures of another, chosen at random; the answers stay."""
    images = [question["images"] for question in questions]
    random.Random(seed).shuffle(images)
    return [{**question, "images": other} for question, other in zip(questions, images, strict=True)]


@torch.inference_mode()
def answer(model, processor, questions: list[dict], batch_size: int = 32, max_new_tokens: int = 16) -> list[str]:
    """
    Greedy answers, in the order of `questions`.

    Rows of like length share a batch, so little is padded; padding is on the left.
    """
    model.eval()
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i]["images"]), len(questions[i]["question"])))
    answers = [""] * len(questions)
    for start in tqdm(range(0, len(order), batch_size), desc="answering", leave=False):
        batch = order[start : start + batch_size]
        conversations = []
        for i in batch:
            content = [{"type": "image", "image": image} for image in questions[i]["images"]]
            content.append({"type": "text", "text": questions[i]["question"]})
            conversations.append([{"role": "user", "content": content}])
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text.strip()
    return answers


def accuracy_by_kind(questions: list[dict], answers: list[str]) -> dict[str, tuple[float, int]]:
    """Share of exact matches and number of questions, per kind and over `"all"`; blanks and case do not count."""
    right = defaultdict(list)
    for question, found in zip(questions, answers, strict=True):
        correct = found.strip().lower() == question["answer"].strip().lower()
        for kind in {question["kind"], "all"}:
            right[kind].append(correct)
    return {kind: (sum(values) / len(values), len(values)) for kind, values in sorted(right.items())}
