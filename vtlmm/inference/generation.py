# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Generate answers to questions about images."""

import threading
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, TextIteratorStreamer

from vtlmm.data.images import image_key, open_image
from vtlmm.data.questions import question_parts
from vtlmm.data.setting_values import require_integers

from .batch_inputs import IMAGES_IN_MEMORY, VisionFeatures, limit_new_tokens, model_inputs
from .prompt_encoding import Prompt
from .shared_prefix import SharedPrefixes


class Answer(NamedTuple):
    """
    A generated text and its log probability in nats: the sum over its tokens and the end of turn.

    Tokens that the generation suppresses have no probability.
    """

    text: str
    log_probability: float


def generate(
    model,
    processor,
    questions: str | list,
    images: Any = None,
    *,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    vision_features: MutableMapping[str, torch.Tensor] | None = None,
) -> list[str]:
    r"""
    Answer questions about images greedily.

    ```python
    >>> [answer] = generate(model, processor, "What is on the table?", "table.jpg")
    >>> answers = generate(model, processor, ["What is it?", "Which one is red?"], ["a.jpg", ["a.jpg", "b.jpg"]])
    ```

    Args:
        model, processor: see [`load_model`].
        questions (`str` or `list`): a question, a conversation (a list of messages), or a list of either. In a
            question, `<image>` is the place of an image, as in a row. Other control tokens in a text are plain text.
        images (*optional*): for one question an image or a list of images; for a list of questions a list with one
            entry per question. An image is a path, a PIL image or the bytes of a file. Images come before a question
            without `<image>`, and fill the `{"type": "image"}` parts of a conversation that have no image.
        max_new_tokens (`int`, *optional*, defaults to 512): longest answer in tokens.
        batch_size (`int`, *optional*, defaults to 8): questions per forward pass.
        vision_features (`MutableMapping[str, torch.Tensor]`, *optional*): vision tower outputs by image key, see
            [`VisionFeatures`]. Missing ones are computed and added, so several calls can share one mapping.

    Returns:
        `list[str]`: one answer for each question.

    Raises:
        `FileNotFoundError`, `ValueError`: for an image that cannot be read, for a number of images that does not fit
            the questions, and for a question that is longer than the decoder's position limit.
    """
    require_integers(max_new_tokens=max_new_tokens, batch_size=batch_size)
    is_one = isinstance(questions, str) or bool(questions and isinstance(questions[0], dict))
    if is_one:
        questions, images = [questions], [images]
    elif images is None:
        images = [None] * len(questions)
    if not isinstance(images, list | tuple) or len(images) != len(questions):
        raise ValueError(f"`images` must be a list with one entry for each of the {len(questions)} questions.")
    sources: dict = {}
    prompts = [build_prompt(*pair, sources) for pair in zip(questions, images, strict=True)]
    if len(prompts) > batch_size:  # an image that cannot be read must not stop the run half-way
        for source in sources.values():
            open_image(source)
    answers = generate_answers(
        model,
        processor,
        prompts,
        sources.__getitem__,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        vision_features=vision_features,
    )
    return [answer.text for answer in answers]


def build_prompt(question: str | list[dict], images: Any, sources: dict) -> Prompt:
    r"""
    Build the prompt of a question or conversation with its images.

    Args:
        question, images: see [`generate`].
        sources (`dict`): gets each image under its key.

    Raises:
        `ValueError`: if the conversation's image parts and the images do not match.
    """
    remaining_images = images if isinstance(images, list | tuple) else [] if images is None else [images]
    if isinstance(question, str):
        question, remaining_images = conversation({"images": list(remaining_images), "question": question}), []
    remaining_images, used, messages = list(remaining_images), [], []
    for message in question:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        messages.append({**message, "content": parts})
        for part in parts:
            if part["type"] == "image":
                if part.get("image") is None and not remaining_images:
                    raise ValueError("The conversation has more image parts than images.")
                used.append(remaining_images.pop(0) if part.get("image") is None else part["image"])
    if remaining_images:
        raise ValueError(f"The conversation has no image part for {len(remaining_images)} of its images.")
    keys = [image_key(source) for source in used]
    sources.update(zip(keys, used, strict=True))
    return Prompt(messages, keys)


def answer_order(prompts: list[Prompt], images_per_group: int = IMAGES_IN_MEMORY) -> list[int]:
    r"""
    Return the order in which prompts are answered.

    Questions about the same images are adjacent, so that their prefix is computed once. Apart from that, prompts of
    similar length are adjacent, so that batches have little padding.

    The prompts are first grouped by their images, `images_per_group` at a time, so that features that are held in
    memory for one group are computed once.
    """
    group_of_image: dict[str, int] = {}
    first: dict[tuple[str, ...], int] = {}  # the first prompt about the same images
    longest: dict[tuple[str, ...], int] = {}  # and the length of the longest one
    lengths = [sum(len(str(message["content"])) for message in prompt.messages) for prompt in prompts]
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        images = tuple(prompt.images)
        for image in images:
            group_of_image.setdefault(image, len(group_of_image) // images_per_group)
        first.setdefault(images, i)
        longest[images] = max(longest.get(images, 0), length)

    def key(i: int) -> tuple[int, ...]:
        images = tuple(prompts[i].images)
        group = max((group_of_image[image] for image in images), default=0)
        return group, len(images), longest[images], first[images], lengths[i]

    return sorted(range(len(prompts)), key=key)


def generate_answers(
    model,
    processor,
    prompts: list[Prompt],
    load_image: Callable,
    *,
    max_new_tokens: int,
    batch_size: int,
    vision_features: MutableMapping[str, torch.Tensor] | None = None,
) -> list[Answer]:
    r"""
    As [`generate`], for prompts whose images are loaded when they are needed.

    Args:
        prompts (`list[Prompt]`)
        load_image (`Callable`): image key to an image as [`open_image`] takes it. Not called for images in
            `vision_features`.

    Returns:
        `list[Answer]`: in the order of `prompts`.
    """
    vision_features = VisionFeatures() if vision_features is None else vision_features
    prefixes = SharedPrefixes(prompts)
    order = answer_order(prompts)
    answers: dict[int, Answer] = {}
    for start in tqdm(range(0, len(order), batch_size), desc="Answering", leave=False, disable=len(order) <= 1):
        batch = order[start : start + batch_size]
        batch_answers = generate_batch(
            model,
            processor,
            [prompts[i] for i in batch],
            load_image,
            max_new_tokens=max_new_tokens,
            vision_features=vision_features,
            prefixes=prefixes,
        )
        answers.update(zip(batch, batch_answers, strict=True))
    return [answers[i] for i in range(len(prompts))]


# ---- One batch ----


class _GreedyLogProbabilities(LogitsProcessor):
    """Record the log probability of the most likely token at each position, and change nothing."""

    def __init__(self) -> None:
        self._by_length: dict[int, torch.Tensor] = {}  # prompt lookup may compute a position twice

    def __call__(self, input_ids, scores):
        self._by_length[input_ids.shape[1]] = scores.amax(-1) - scores.logsumexp(-1)
        return scores

    def stacked(self, length: int) -> torch.Tensor:
        """Return the log probabilities of the first `length` positions, `(batch_size, length)`."""
        return torch.stack([self._by_length[key] for key in sorted(self._by_length)[:length]], 1)


@torch.inference_mode()
def generate_batch(
    model,
    processor,
    prompts: list[Prompt],
    load_image: Callable,
    *,
    max_new_tokens: int,
    vision_features: MutableMapping[str, torch.Tensor],
    prefixes: SharedPrefixes,
) -> list[Answer]:
    """As [`generate_answers`], in one forward pass per token."""
    if model.training:
        model.eval()
    inputs = prefixes.batch_inputs(model, processor, prompts, load_image, vision_features)
    longest, greedy = int(inputs["attention_mask"].sum(1).max()), _GreedyLogProbabilities()
    ids = model.generate(
        **inputs,
        max_new_tokens=limit_new_tokens(model, longest, max_new_tokens),
        do_sample=False,
        num_beams=1,
        logits_processor=LogitsProcessorList([greedy]),
    )
    new_ids = ids[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(new_ids, skip_special_tokens=True)
    eos_token_id = model.generation_config.eos_token_id
    ends = torch.tensor([] if eos_token_id is None else eos_token_id, dtype=torch.long, device=new_ids.device)
    num_ends_before = torch.isin(new_ids, ends).cumsum(1).roll(1, 1)  # padding comes after the end
    num_ends_before[:, 0] = 0
    sums = greedy.stacked(new_ids.shape[1]).masked_fill(num_ends_before > 0, 0.0).sum(1)
    return [Answer(text.strip(), value) for text, value in zip(texts, sums.tolist(), strict=True)]


# ---- Streaming ----


class _StopOnEvent(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def stream_answer(
    model,
    processor,
    messages: list[dict],
    max_new_tokens: int = 512,
    vision_features: MutableMapping[str, torch.Tensor] | None = None,
) -> Iterator[str]:
    r"""
    Yield the greedy answer to a conversation piece by piece. Closing the iterator stops the generation.

    Args:
        messages (`list[dict]`): a conversation whose last message is the user's, see [`generate`].
    """
    require_integers(max_new_tokens=max_new_tokens)
    sources: dict = {}
    prompt = build_prompt(messages, None, sources)
    features = VisionFeatures() if vision_features is None else vision_features
    model.eval()
    inputs = model_inputs(model, processor, [prompt], sources.__getitem__, features)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped = threading.Event()
    settings: dict[str, Any] = {
        "max_new_tokens": limit_new_tokens(model, inputs["input_ids"].shape[1], max_new_tokens),
        "do_sample": False,
        "stopping_criteria": [_StopOnEvent(stopped)],
    }
    with ThreadPoolExecutor(1) as executor:
        generation = executor.submit(model.generate, **inputs, **settings, streamer=streamer)
        generation.add_done_callback(lambda _: streamer.end())  # nothing else ends the stream after an error
        try:
            yield from streamer
        finally:
            stopped.set()
        generation.result()


# ---- Questions as dicts ----


def conversation(question: dict) -> list[dict]:
    """Return the messages of a question, with its images in place: `before`, then the user's turn."""
    before = question.get("before", ())
    num_before = sum(part["type"] == "image" for message in before for part in message["content"])
    content = question_parts(question["question"], len(question["images"]) - num_before)
    images = iter(question["images"])

    def with_image(part: dict) -> dict:
        return {**part, "image": next(images)} if part["type"] == "image" else part

    messages = (*before, {"role": "user", "content": content})
    num_parts = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_parts != len(question["images"]):
        raise ValueError(
            f"The question {question['question'][:60]!r} has {num_parts} image placeholders and "
            f"{len(question['images'])} images. Give each image one placeholder, or remove all placeholders."
        )
    return [{**message, "content": [with_image(part) for part in message["content"]]} for message in messages]


def answer_batch(model, processor, questions: list[dict], max_new_tokens: int = 16) -> list[str]:
    """Answer questions with PIL images in one batch."""
    return answer(model, processor, questions, len(questions), max_new_tokens)


def answer(model, processor, questions: list[dict], batch_size: int = 32, max_new_tokens: int = 16) -> list[str]:
    """Answer questions with PIL images, in their order."""
    conversations = [conversation(question) for question in questions]
    return generate(model, processor, conversations, max_new_tokens=max_new_tokens, batch_size=batch_size)
