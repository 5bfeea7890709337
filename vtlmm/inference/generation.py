# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Answers to questions about images, scored by exact match, beside the blind control."""

import random
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm.auto import tqdm
from transformers import StoppingCriteria, TextIteratorStreamer

from vtlmm.data.images import image_key
from vtlmm.data.questions import question_parts


def with_shuffled_images(questions: list[dict], seed: int = 0) -> list[dict]:
    """
    The blind control: every question gets other images; the answers stay.

    The different images stand in a ring, in random order, and each of a question's is replaced by the next that is
    not the question's. So a question never sees its own, unless it has all there are.

    Args:
        questions (`list[dict]`): with `images`: images, or their keys from [`~vtlmm.data.images.image_key`].
        seed (`int`, *optional*, defaults to 0): of the order.
    """
    keys = [
        [image if isinstance(image, str) else image_key(image) for image in question["images"]]
        for question in questions
    ]
    images = {
        key: image
        for question, own in zip(questions, keys, strict=True)
        for key, image in zip(own, question["images"], strict=True)
    }
    ring = list(images)
    random.Random(seed).shuffle(ring)
    following = dict(zip(ring, ring[1:] + ring[:1], strict=True))

    def replacement(key: str, own: list[str]) -> str:
        other = following[key]
        while other in own and other != key:
            other = following[other]
        return following[key] if other == key else other

    return [
        {**question, "images": [images[replacement(key, own)] for key in own]}
        for question, own in zip(questions, keys, strict=True)
    ]


def asking_order(questions: list[dict]) -> list[int]:
    """Indices such that questions of like length stand together: so a batch has little padding."""
    return sorted(range(len(questions)), key=lambda i: (len(questions[i]["images"]), len(questions[i]["question"])))


def conversation(question: dict) -> list[dict]:
    """Return the messages of a question, with its images in place: `before`, then the user's turn."""
    before = question.get("before", ())
    num_before = sum(part["type"] == "image" for message in before for part in message["content"])
    content = question_parts(question["question"], len(question["images"]) - num_before)
    images = iter(question["images"])

    def with_image(part: dict) -> dict:
        return {**part, "image": next(images)} if part["type"] == "image" else part

    messages = (*before, {"role": "user", "content": content})
    return [{**message, "content": [with_image(part) for part in message["content"]]} for message in messages]


@torch.inference_mode()
def answer_conversations(model, processor, conversations: list[list[dict]], max_new_tokens: int = 16) -> list[str]:
    """Greedy answers to conversations whose images are from PIL, all at once; padding is on the left."""
    model.eval()
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
    return [text.strip() for text in texts]


class _StopWhen(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def stream_answer(model, processor, messages: list[dict], max_new_tokens: int = 512) -> Iterator[str]:
    r"""
    The greedy answer to a conversation in pieces, as they are generated. Whoever stops listening stops it.

    Args:
        messages (`list[dict]`): turns as [`conversation`] makes them, the last one the user's.
    """
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped = threading.Event()
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "stopping_criteria": [_StopWhen(stopped)]}
    with ThreadPoolExecutor(1) as executor:
        generation = executor.submit(model.generate, **inputs, **settings, streamer=streamer)
        generation.add_done_callback(lambda _: streamer.end())  # after an error nobody else would end it
        try:
            yield from streamer
        finally:
            stopped.set()
        generation.result()


def answer_batch(model, processor, questions: list[dict], max_new_tokens: int = 16) -> list[str]:
    """As [`answer_conversations`], for questions."""
    return answer_conversations(model, processor, [conversation(q) for q in questions], max_new_tokens)


def answer(model, processor, questions: list[dict], batch_size: int = 32, max_new_tokens: int = 16) -> list[str]:
    """Greedy answers, in the order of `questions`. Rows of like length share a batch."""
    order = asking_order(questions)
    answers = [""] * len(questions)
    for start in tqdm(range(0, len(order), batch_size), desc="answering", leave=False):
        batch = order[start : start + batch_size]
        texts = answer_batch(model, processor, [questions[i] for i in batch], max_new_tokens)
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text
    return answers


def accuracy_by_kind(questions: list[dict], answers: list[str]) -> dict[str, tuple[float, int]]:
    """Share of exact matches and number of questions, per kind and over `"all"`; blanks and case do not count."""
    right = defaultdict(list)
    for question, found in zip(questions, answers, strict=True):
        correct = found.strip().lower() == question["answer"].strip().lower()
        for kind in {question["kind"], "all"}:
            right[kind].append(correct)
    return {kind: (sum(values) / len(values), len(values)) for kind, values in sorted(right.items())}
