# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The fields of a chat completion, over a socket."""

import base64
import inspect
import io
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.serving import (
    NAME,
    QUESTION,
    body,
    build_serving_model,
    complete,
    data_uri,
    joined,
    running_server,
    stream,
    text_of,
    user,
)
from helpers.tiny_models import build_processor
from PIL import Image

from vtlmm.cli.app import app
from vtlmm.cli.serve import serve
from vtlmm.inference.generation import generate


@pytest.fixture(scope="module")
def model():
    return build_serving_model()


@pytest.fixture(scope="module")
def client(model):
    with running_server(model) as client:
        yield client


def expected(model, question: str, *colors: str, length: int = 6) -> str:
    images = [Image.new("RGB", (28, 28), color) for color in colors]
    [answer] = generate(model, build_processor(), question, images, max_new_tokens=length)
    return answer


def test_answers_about_text_and_images(model, client):
    reply = complete(client)
    assert text_of(reply) == expected(model, "hello")
    assert reply["object"] == "chat.completion" and reply["model"] == NAME
    assert reply["choices"][0]["finish_reason"] == "length" and reply["choices"][0]["logprobs"] is None
    answers = [text_of(complete(client, user(QUESTION, data_uri(color)))) for color in ("red", "blue")]
    assert answers == [expected(model, QUESTION, color) for color in ("red", "blue")] and len(set(answers)) == 2
    both = complete(client, user(QUESTION, data_uri("red"), data_uri("blue")))
    assert text_of(both) == expected(model, QUESTION, "red", "blue")


def test_requests_at_the_same_time(model, client):
    colors = ("red", "blue", "green", "white") * 4
    with ThreadPoolExecutor(16) as executor:
        jobs = [
            executor.submit(complete, client, user(QUESTION, data_uri(color)), max_tokens=4 + i)
            for i, color in enumerate(colors)
        ]
        answers = [text_of(job.result()) for job in jobs]
    assert answers == [expected(model, QUESTION, color, length=4 + i) for i, color in enumerate(colors)]


def test_usage_counts_tokens_with_image_patches(client):
    usage = complete(client, user(QUESTION, data_uri()))["usage"]
    # <s> USER : <image> ×4 what is in the image ? ASSISTANT :
    assert usage == {"prompt_tokens": 15, "completion_tokens": 6, "total_tokens": 21}
    assert complete(client, n=3, temperature=1)["usage"]["completion_tokens"] == 18


def test_conversation_with_an_answer(client):
    first = user(QUESTION, data_uri("red"))
    turns = [*first, {"role": "assistant", "content": "red"}, *user("is it blue ?")]
    parts = [*first, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}, *user("is it blue ?")]
    assert text_of(complete(client, turns)) == text_of(complete(client, parts)) != text_of(complete(client, first))


def test_stream_equals_reply(client):
    for fields in ({}, {"n": 2, "temperature": 1.0, "seed": 3}, {"logprobs": True, "top_logprobs": 2}):
        whole = complete(client, user(QUESTION, data_uri()), **fields)
        events = stream(client, user(QUESTION, data_uri()), **fields)
        assert [joined(events, i) for i in range(len(whole["choices"]))] == [
            choice["message"]["content"] for choice in whole["choices"]
        ]
        assert all(event["object"] == "chat.completion.chunk" and "usage" not in event for event in events)
        assert len([event for event in events if event["choices"][0]["delta"].get("content")]) >= 5
        roles = [event["choices"][0]["delta"].get("role") for event in events]
        assert roles[: len(whole["choices"])] == ["assistant"] * len(whole["choices"])
        reasons = [event["choices"][0]["finish_reason"] for event in events]
        assert [reason for reason in reasons if reason] == ["length"] * len(whole["choices"])
        logprobs = [event["choices"][0]["logprobs"] for event in events]
        content = [entry for each in logprobs if each for entry in each["content"]]
        assert content == ((whole["choices"][0]["logprobs"] or {}).get("content") or [])


def test_stream_options_include_usage(client):
    usage = complete(client)["usage"]
    *events, last = stream(client, stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"] == usage
    assert all(event["usage"] is None for event in events)


def test_stop_strings_across_tokens(model, client):
    words = expected(model, "hello").split()
    # the second word must not occur before, and the stop string begins inside the first word
    first, second = words[0], words[1]
    stop = f"{first[-1]} {second[:2]}"
    reply = complete(client, stop=stop)
    assert text_of(reply) == first[:-1] and reply["choices"][0]["finish_reason"] == "stop"
    assert joined(stream(client, stop=stop)) == first[:-1]
    assert text_of(complete(client, stop=["never", f" {second}"])) == first
    assert joined(stream(client, stop=["never", f" {second}"])) == first
    # a stop string that does not come, but whose start does
    assert text_of(complete(client, stop=f"{words[-1]} never")) == " ".join(words)
    assert joined(stream(client, stop=f"{words[-1]} never")) == " ".join(words)


def test_seed_makes_answers_reproducible_next_to_other_requests(client):
    fields = {"temperature": 1.3, "top_p": 0.9, "seed": 7, "max_tokens": 12}
    alone = text_of(complete(client, **fields))
    assert text_of(complete(client, **{**fields, "seed": 8})) != alone
    with ThreadPoolExecutor(8) as executor:
        others = [executor.submit(complete, client, user(QUESTION), temperature=2, max_tokens=9) for _ in range(4)]
        same = [executor.submit(complete, client, **fields) for _ in range(4)]
        assert {text_of(job.result()) for job in same} == {alone}
        assert len({text_of(job.result()) for job in others}) > 1  # without a seed


def test_n_answers(client):
    reply = complete(client, n=4, temperature=1.5, seed=0)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    answers = [text_of(reply, i) for i in range(4)]
    assert len(set(answers)) > 1 and answers[0] == text_of(complete(client, temperature=1.5, seed=0))
    greedy = complete(client, n=2)
    assert text_of(greedy, 0) == text_of(greedy, 1)


def test_logprobs_equal_a_direct_forward(model, client):
    reply = complete(client, user("hello"), logprobs=True, top_logprobs=3, frequency_penalty=1.0)
    processor = build_processor()
    prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "hello"}]}])
    words = text_of(reply).split()
    ids = processor.tokenizer(f"{prompt} ASSISTANT : {' '.join(words)}".replace("ASSISTANT : ASSISTANT", "ASSISTANT"))
    ids = torch.tensor([ids["input_ids"]])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    content = reply["choices"][0]["logprobs"]["content"]
    assert [entry["token"].strip() for entry in content] == words
    for i, entry in enumerate(content):
        position = len(ids[0]) - len(words) + i - 1
        assert entry["logprob"] == pytest.approx(logprobs[position, ids[0, position + 1]].item(), abs=1e-4)
        top = logprobs[position].topk(3)
        assert [each["logprob"] for each in entry["top_logprobs"]] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert bytes(entry["bytes"]).decode() == entry["token"]


def test_penalties_change_repeated_tokens(client):
    plain = text_of(complete(client, max_tokens=20)).split()
    penalized = text_of(complete(client, max_tokens=20, frequency_penalty=2.0, presence_penalty=2.0)).split()
    assert len(set(penalized)) > len(set(plain))
    rewarded = text_of(complete(client, max_tokens=20, presence_penalty=-2.0, frequency_penalty=-2.0)).split()
    assert len(set(rewarded)) <= len(set(plain))


def test_token_limits(client):
    assert complete(client, max_tokens=None, max_completion_tokens=2)["usage"]["completion_tokens"] == 2
    assert complete(client, max_tokens=3, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


def test_null_is_the_default(client):
    names = ("top_p", "n", "stop", "seed", "logprobs", "top_logprobs", "frequency_penalty", "stream", "stream_options")
    reply = client.post("/v1/chat/completions", json={**body(), **dict.fromkeys(names)})
    assert reply.status_code == 200 and text_of(reply.json()) == text_of(complete(client))


IMAGES = {
    "png": data_uri(),
    "charset": data_uri(header="image/png;charset=utf-8;base64"),
    "octet stream": data_uri(header="application/octet-stream;base64"),
    "wrong media type": data_uri(header="image/jpeg;base64"),
    "no media type": data_uri(header=";base64"),
    "upper case": data_uri(header="image/png;BASE64").replace("data:", "DATA:"),
    "bmp": data_uri(file_format="BMP"),
}


@pytest.mark.parametrize("url", IMAGES.values(), ids=IMAGES)
def test_data_uris(model, client, url):
    assert text_of(complete(client, user(QUESTION, url))) == expected(model, QUESTION, "red")


def large_png(side: int) -> str:
    """Return a data URI of a small file with many pixels."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def part(**fields) -> list[dict]:
    return [{"role": "user", "content": [fields]}]


# name: changes of the body, status, `param` of the error, part of its message
INVALID = {
    "no messages": ({"messages": []}, 400, "messages", "at least 1"),
    "no model": ({"model": None}, 400, "model", "required"),
    "other model": ({"model": "another"}, 404, "model", "another"),
    "unknown field": ({"nonsense": 1}, 400, "nonsense", "Unsupported field: nonsense"),
    "tools": ({"tools": []}, 400, "tools", "Unsupported field: tools"),
    "template arguments": ({"chat_template_kwargs": {"images": [__file__]}}, 400, "chat_template_kwargs", "Unsupp"),
    "temperature": ({"temperature": 2.1}, 400, "temperature", "less than or equal to 2"),
    "temperature text": ({"temperature": "1"}, 400, "temperature", "valid number"),
    "top_p": ({"top_p": -0.1}, 400, "top_p", "greater than"),
    "n": ({"n": 0}, 400, "n", "greater than"),
    "n above the batch": ({"n": 33}, 400, "n", "at most 32"),
    "n bool": ({"n": True}, 400, "n", "integer"),
    "stop": ({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
    "empty stop": ({"stop": ""}, 400, "stop", "at least 1"),
    "seed": ({"seed": 2**63}, 400, "seed", "less than"),
    "max_tokens": ({"max_tokens": -1}, 400, "max_tokens", "greater than"),
    "max_tokens above the limit": ({"max_tokens": 1025}, 400, "max_tokens", "at most 1024"),
    "two limits": ({"max_completion_tokens": 7}, 400, None, "differ"),
    "top_logprobs": ({"top_logprobs": 2}, 400, None, "needs `logprobs: true`"),
    "top_logprobs 21": ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "less than"),
    "penalty": ({"frequency_penalty": 3}, 400, "frequency_penalty", "less than"),
    "stream_options": ({"stream_options": {"include_usage": True}}, 400, None, "needs `stream: true`"),
    "stream_options field": (
        {"stream": True, "stream_options": {"x": 1}},
        400,
        "stream_options.x",
        "Unsupported field: stream_options.x",
    ),
    "role": ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0", "role"),
    "role of the template": ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages", "unknown role"),
    "no role": ({"messages": [{"content": "hello"}]}, 400, "messages.0", "role"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "required"),
    "number": ({"messages": [{"role": "user", "content": 1}]}, 400, "messages.0.content", "valid"),
    "part": ({"messages": [{"role": "user", "content": ["hello"]}]}, 400, "messages.0.content.0", "valid dict"),
    "empty parts": ({"messages": [{"role": "user", "content": []}]}, 400, "messages.0.content", "at least 1"),
    "audio": ({"messages": part(type="input_audio")}, 400, "messages.0.content.0", "input_audio"),
    "text field": ({"messages": part(type="text", text="a", x=1)}, 400, "messages.0.content.0.x", "Unsupported"),
    "image string": (
        {"messages": part(type="image_url", image_url="data:")},
        400,
        "messages.0.content.0.image_url",
        "valid dict",
    ),
    "detail": (
        {"messages": part(type="image_url", image_url={"url": data_uri(), "detail": "high"})},
        400,
        "messages.0.content.0.image_url.detail",
        "auto",
    ),
    "image of the assistant": (
        {"messages": [{"role": "assistant", "content": user("", data_uri())[0]["content"]}]},
        400,
        "messages.0.content.0.image_url",
        "Unsupported field",
    ),
    "url": ({"messages": user("", "http://127.0.0.1:1/a.png")}, 400, "messages.0.content.0.image_url", "no URLs"),
    "https": ({"messages": user("", "https://example.com/a.png")}, 400, "messages.0.content.0.image_url", "no URLs"),
    "file": ({"messages": user("", __file__)}, 400, "messages.0.content.0.image_url", "opens no files"),
    "file url": ({"messages": user("", f"file://{__file__}")}, 400, "messages.0.content.0.image_url", "no files"),
    "no base64": ({"messages": user("", "data:image/png;base64,*")}, 400, "messages.0.content.0.image_url", "base64"),
    "text data": ({"messages": user("", "data:text/html,x")}, 400, "messages.0.content.0.image_url", "data URI must"),
    "no content of the data": ({"messages": user("", "data:image/png;base64,")}, 400, None, "no content"),
    "no image": ({"messages": user("", "data:image/png;base64,AAAA")}, 400, "messages", "not an image"),
    "truncated image": ({"messages": user("", data_uri()[:-60])}, 400, "messages", "image"),
    "many pixels": ({"messages": user("", large_png(4097))}, 400, "messages", "more than the maximum of 12,582,912"),
    "many images": ({"messages": user("", *[data_uri()] * 9)}, 400, "messages", "9 images"),
    "long prompt": ({"messages": user("hello " * 3000)}, 400, "messages", "At most 2047 tokens"),
    "very long prompt": ({"messages": user("hello " * 10**6)}, 400, "messages", "characters"),
    "surrogate": ({"messages": user("\ud800")}, 400, None, ""),
}


@pytest.mark.parametrize(("changes", "status", "param", "message"), INVALID.values(), ids=INVALID)
def test_invalid_requests(client, changes, status, param, message):
    content = json.dumps(body(**changes) if changes.get("model", 1) else {"messages": user()})
    reply = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    error = reply.json()["error"]
    assert reply.status_code == status, error
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"a"', b"\xff", b"[" * 100_000, b'{"temperature": NaN}', b'{"n": 1e999}']
)
def test_invalid_bodies(client, content):
    reply = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"


def test_other_routes(client):
    [entry] = client.get("/v1/models").json()["data"]
    assert entry["id"] == NAME and client.get(f"/v1/models/{NAME}").json() == entry
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert client.get("/health").json() == {"status": "ok"}
    assert [client.get(path).status_code for path in ("/", "/docs", "/openapi.json", "/v1/responses")] == [404] * 4
    assert client.get("/v1/chat/completions").status_code == 405
    assert "error" in client.get("/nothing").json()


def read_metrics(client) -> dict[str, float]:
    lines = client.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_metrics(client):
    complete(client, user(QUESTION, data_uri("black")))
    before = read_metrics(client)
    for _ in range(3):
        complete(client, user(QUESTION, data_uri("black")))
    after = read_metrics(client)
    grown = {name: after[name] - before[name] for name in before}
    assert grown["vtlmm_prompt_tokens_total"] == 45 and grown["vtlmm_generated_tokens_total"] == 18
    assert grown["vtlmm_images_encoded_total"] == 0  # the vision features of the image are in memory
    assert grown['vtlmm_http_responses_total{path="/v1/chat/completions",status="200"}'] == 3
    assert grown["vtlmm_request_seconds_count"] == 3 and after["vtlmm_requests_waiting"] == 0


def test_default_host_is_loopback():
    for command in (serve, app):
        assert inspect.signature(command).parameters["host"].default == "127.0.0.1"
