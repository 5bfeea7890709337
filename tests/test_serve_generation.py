# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The batch that changes at each step, sampling, and the text of growing answers."""

import queue
import time

import pytest
import torch
from helpers.serving import QUESTION, build_serving_model
from helpers.tiny_models import build_processor, build_tokenizer
from PIL import Image
from transformers import GenerationConfig

from vtlmm.hub.export_llava import export_to_llava
from vtlmm.inference.answer_text import AnswerText, TokenTexts
from vtlmm.inference.batch_inputs import image_inputs
from vtlmm.inference.decoding_batch import DecodingBatch
from vtlmm.inference.generation import build_prompt, generate
from vtlmm.inference.loading import load_model
from vtlmm.inference.prompt_encoding import encode_prompt
from vtlmm.inference.sampling import RowSampler, Sampling, choose_tokens
from vtlmm.inference.scheduler import ClosedError, GenerationRequest, QueueFullError, Scheduler


@pytest.fixture
def schedule():
    """Function of a model that gives a scheduler."""
    schedulers = []

    def start(model, **settings) -> Scheduler:
        schedulers.append(Scheduler(model, build_processor(), **settings))
        return schedulers[-1]

    yield start
    for scheduler in schedulers:
        scheduler.close()


def image(color: str) -> Image.Image:
    return Image.new("RGB", (28, 28), color)


def submit(scheduler: Scheduler, question: str, images=(), length: int = 6, **settings) -> queue.Queue:
    """Return a queue that gets the answer."""
    sources: dict = {}
    content = [*({"type": "image", "image": each} for each in images), {"type": "text", "text": question}]
    prompt = build_prompt([{"role": "user", "content": content}], None, sources)
    token_ids = encode_prompt(scheduler.processor, prompt.messages)
    received: queue.Queue = queue.Queue()
    num_tokens = len(token_ids) + 3 * len(images)
    request = GenerationRequest(token_ids, prompt.images, sources, num_tokens, length, received.put, **settings)
    received.request = request
    scheduler.submit(request)
    return received


QUESTIONS = [
    ("hello", []),
    (QUESTION, ["red"]),
    ("is it red ? " * 8, ["blue", "white"]),
    ("describe it", ["green"]),
] * 3


def expected_answers(model, lengths: list[int]) -> list[str]:
    """Return the greedy answers of `generate`, one by one."""
    processor, answers = build_processor(), []
    for (text, colors), length in zip(QUESTIONS, lengths, strict=True):
        answers += generate(model, processor, text, [image(color) for color in colors], max_new_tokens=length)
    return answers


def scheduled_answers(scheduler: Scheduler, lengths: list[int], pause: float) -> list[str]:
    received = []
    for (text, colors), length in zip(QUESTIONS, lengths, strict=True):
        received.append(submit(scheduler, text, [image(color) for color in colors], length))
        time.sleep(pause)
    return [each.get(timeout=60).text for each in received]


LENGTHS = [30, 4, 9, 1, 17, 2, 25, 12, 3, 8, 20, 5]
DECODERS = {
    "llama": {},
    "qwen3": {"text": "qwen3"},
    "sliding window": {"text": "mistral", "window": 8},  # shorter than the prompts; rows cannot join
    "repetition penalty": {"generation": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3}},
    "end of sequence": {"generation": {"eos_token_id": list(range(4, 14))}},
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", DECODERS.values(), ids=DECODERS)
def test_batched_answers_equal_generate_one_by_one(schedule, settings):
    model = build_serving_model(**({"text": settings["text"]} if "text" in settings else {}))
    if "window" in settings:
        model.config.text_config.sliding_window = settings["window"]
        model.config.text_config.layer_types = ["sliding_attention"] * 2
    suppressed = model.generation_config.suppress_tokens
    model.generation_config = GenerationConfig(
        **{"bos_token_id": 1, "pad_token_id": 3, "suppress_tokens": suppressed, **settings.get("generation", {})}
    )
    answers = expected_answers(model, LENGTHS)
    if ends := settings.get("generation", {}).get("eos_token_id"):  # these are words, which `generate` keeps
        words = build_tokenizer().convert_ids_to_tokens(ends)
        answers = [text.rsplit(" ", 1)[0] if text.split()[-1] in words else text for text in answers]
    scheduler = schedule(model, max_rows=5)
    assert scheduled_answers(scheduler, LENGTHS, pause=0.004) == answers
    assert len(set(answers)) > 6
    steps = scheduler.statistics.steps
    assert steps < sum(LENGTHS)  # rows shared steps
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.statistics.generated_tokens == sum(len(text.split()) for text in answers)


def test_a_running_batch_takes_new_rows_and_removes_padding(schedule):
    model = build_serving_model()
    scheduler = schedule(model)
    long = submit(scheduler, "is it red ? " * 20, length=40)
    first = submit(scheduler, "hello", length=400, is_streamed=True)
    first.get(timeout=60)
    second = submit(scheduler, "describe", length=3)
    long.get(timeout=60)
    second.get(timeout=60)

    def look():  # between two steps
        [row], batch = scheduler._rows, scheduler._batch
        assert batch.attention_mask.all()  # without the padding for the long prompt
        return [
            batch.attention_mask.shape[1],
            batch.cache.get_seq_length(),
            row.request.num_tokens + len(row.text.tokens),
        ]

    assert len(set(scheduler.call(look))) == 1
    pieces = []
    while not pieces or pieces[-1].finish_reason is None:
        pieces.append(first.get(timeout=60))
    assert pieces[-1].num_tokens == 400


def test_tower_runs_once_for_each_image(schedule):
    model = build_serving_model()
    scheduler = schedule(model)
    encoded: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    received = [submit(scheduler, QUESTION, [image(color)]) for color in ("red", "blue", "red", "red")]
    texts = [each.get(timeout=60).text for each in received]
    assert sum(encoded) == 2 and texts[0] == texts[2] == texts[3] != texts[1]


def test_exported_llava(schedule, tmp_path):
    model = build_serving_model()
    model.save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    export_to_llava(str(tmp_path / "model"), tmp_path / "llava")
    scheduler = schedule(load_model(tmp_path / "llava").model)
    expected = generate(model, build_processor(), QUESTION, image("red"), max_new_tokens=6)
    for _ in range(2):  # the second answer uses the features in memory
        assert [submit(scheduler, QUESTION, [image("red")]).get(timeout=60).text] == expected
    assert len(scheduler.vision_features) == 1 and scheduler.statistics.images_encoded == 1


def test_failed_request_does_not_fail_its_neighbors(schedule):
    model = build_serving_model()
    scheduler = schedule(model)
    blocker = submit(scheduler, "hello", length=2000, is_streamed=True)
    blocker.get(timeout=60)
    received = [submit(scheduler, QUESTION, [image("red")]) for _ in range(2)]
    broken = submit(scheduler, QUESTION, [image("blue")])
    broken.request.token_ids = broken.request.token_ids[:2]  # without its image token
    assert [each.get(timeout=60).text for each in received] == generate(
        model, build_processor(), [QUESTION] * 2, [image("red")] * 2, max_new_tokens=6
    )
    assert isinstance(broken.get(timeout=60), ValueError) and scheduler.num_running == 1
    blocker.request.cancel()


def test_failed_step_fails_its_requests_only(schedule, monkeypatch):
    model = build_serving_model()
    scheduler = schedule(model)
    received = submit(scheduler, "hello", length=20_000)
    forward = model.lm_head.forward

    def broken(*args):
        monkeypatch.setattr(model.lm_head, "forward", forward)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(model.lm_head, "forward", broken)
    assert isinstance(received.get(timeout=60), torch.OutOfMemoryError)
    assert submit(scheduler, "hello").get(timeout=60).finish_reason == "length"


def test_each_request_ends_if_the_second_one_cannot_join(schedule, monkeypatch):
    model = build_serving_model()
    scheduler = schedule(model)
    first_step, join = scheduler._first_step, DecodingBatch.join
    sizes, failed_joins = [], []

    def first_step_of_one(requests):
        sizes.append(len(requests))
        if len(requests) > 1:
            raise torch.OutOfMemoryError("no memory for the prompts")
        return first_step(requests)

    def join_once_broken(batch, other):
        if not failed_joins:
            failed_joins.append(other)
            raise torch.OutOfMemoryError("no memory for the batch")
        join(batch, other)

    monkeypatch.setattr(scheduler, "_first_step", first_step_of_one)
    monkeypatch.setattr(DecodingBatch, "join", join_once_broken)
    # The scheduler's thread waits in this call, so that the requests start together
    received = scheduler.call(lambda: [submit(scheduler, "hello") for _ in range(3)])
    answers = [each.get(timeout=20) for each in received]
    assert sizes == [3, 1, 1, 1]
    assert [isinstance(answer, torch.OutOfMemoryError) for answer in answers] == [True, True, False]
    assert [answers[2].text] == generate(model, build_processor(), "hello", max_new_tokens=6)
    assert scheduler.num_running == scheduler.num_waiting == 0


@pytest.mark.parametrize("configured", [False, True])
def test_kind_of_image_features_is_that_of_the_config_after_other_requests(schedule, configured):
    model = build_serving_model()
    model.config.use_pseudo_image_features = configured
    scheduler = schedule(model)

    def answer(use_pseudo: bool | None) -> str:
        received = submit(scheduler, QUESTION, [image("red")], 12, use_pseudo_image_features=use_pseudo)
        return received.get(timeout=60).text

    default = answer(None)
    other = answer(not configured)
    assert answer(None) == default == answer(configured) != other


def test_full_queue_and_closed_scheduler(schedule):
    scheduler = schedule(build_serving_model(), max_rows=1, max_waiting=1)
    running = submit(scheduler, "hello", length=20_000, is_streamed=True)
    running.get(timeout=60)
    waiting = submit(scheduler, "hello")
    with pytest.raises(QueueFullError):
        submit(scheduler, "hello")
    with pytest.raises(ValueError, match="2 answers"):
        submit(scheduler, "hello", num_answers=2)
    scheduler.close()
    assert isinstance(waiting.get(timeout=60), ClosedError)
    with pytest.raises(ClosedError):
        submit(scheduler, "hello")


# ---- Sampling ----


def test_sampled_tokens_have_the_probabilities_of_the_settings():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -float("inf")])
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7), (1.0, 0.95), (1.0, 0.0)):
        probabilities = (logits / temperature).softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # the logits are sorted
        kept = probabilities * ((before < top_p) | (torch.arange(5) == 0))
        kept /= kept.sum()
        samplers = [RowSampler(Sampling(temperature, top_p, seed=i)) for i in range(4000)]
        tokens = torch.tensor(choose_tokens(logits.repeat(4000, 1), samplers))
        frequencies = tokens.bincount(minlength=5) / 4000
        assert (frequencies - kept).abs().max() < 0.03
        assert frequencies[kept == 0].sum() == 0


def test_penalties_are_those_of_openai():
    sampler = RowSampler(Sampling(frequency_penalty=0.5, presence_penalty=0.25))
    tokens = [choose_tokens(torch.tensor([[1.0, 0.9, 0.0]]), [sampler])[0] for _ in range(6)]
    expected, counts = [], [0, 0, 0]
    for _ in range(6):
        values = [value - 0.5 * n - 0.25 * (n > 0) for value, n in zip([1.0, 0.9, 0.0], counts, strict=True)]
        expected.append(values.index(max(values)))
        counts[expected[-1]] += 1
    assert tokens == expected and set(tokens) == {0, 1, 2}


def test_extreme_temperatures_do_not_fail():
    logits = torch.tensor([[5.0, -3e38, 4.0]])
    for temperature in (1e-320, 1e-9, 1e-4, 2.0):
        assert choose_tokens(logits.clone(), [RowSampler(Sampling(temperature, seed=0))])[0] in (0, 2)
    assert choose_tokens(logits.clone(), [RowSampler(Sampling(1e-4, 1e-9, seed=0))]) == [0]


class MPSTensor(torch.Tensor):
    """A CPU tensor that names MPS as its device and has no float64."""

    device = torch.device("mps")

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("MPS has no float64")


def test_samples_on_mps_are_those_of_the_cpu():
    scores = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    settings = [Sampling(1.5, top_p=0.9 if i % 2 else 1.0, seed=i) for i in range(50)]
    expected = choose_tokens(scores.clone(), [RowSampler(each) for each in settings])
    tokens = choose_tokens(scores.clone().as_subclass(MPSTensor), [RowSampler(each) for each in settings])
    assert tokens == expected != scores.argmax(-1).tolist()


# ---- Text ----


class Characters:
    """A tokenizer of UTF-8 bytes."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", errors="replace")

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": list(text.encode())}


@pytest.mark.parametrize("stop", [(), ("ö!",), ("xx", "ö"), ("never",), ("\n",), ("llo wör",)])
@pytest.mark.parametrize("text", ["  hello wörld ö! \n more ☃ text ", "a", "", "   ", "xö", "☃☃"])
def test_pieces_of_a_text(text, stop):
    answer, pieces = AnswerText(Characters(), stop), []
    for byte in text.encode():
        answer.tokens.append(byte)
        answer.decode()
        pieces.append(answer.new_text())
        if answer.is_stopped:
            break
    pieces.append(answer.finish())
    positions = [text.find(each) for each in stop if each in text]
    expected = text[: min(positions)] if positions else text
    assert "".join(pieces) == answer.text == expected.strip()
    assert answer.is_stopped == bool(positions)
    assert "\ufffd" not in "".join(pieces)


def test_incomplete_character_at_the_end():
    answer = AnswerText(Characters())
    answer.tokens += list("a☃".encode())[:-1]
    assert answer.finish() == "a\ufffd"


def test_texts_of_tokens():
    tokenizer = build_tokenizer()
    texts = TokenTexts(tokenizer)
    assert texts[tokenizer.convert_tokens_to_ids("red")] == " red"


def test_features_of_cached_and_new_images():
    model, processor = build_serving_model(), build_processor()
    images = {"a": image("red"), "b": image("blue")}
    features: dict = {}
    first = image_inputs(model, processor, ["a"], images.__getitem__, features)
    both = image_inputs(model, processor, ["a", "b", "a"], images.__getitem__, features)
    assert torch.equal(first["a"], both["a"]) and not torch.equal(both["a"], both["b"])
