# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Test `vtlmm serve` with the OpenAI client over loopback."""

import base64
import inspect
import io
import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.tiny_models import build_processor, scale_weights
from PIL import Image

from vtlmm.cli.app import app
from vtlmm.cli.serve import serve
from vtlmm.inference.generation import generate


openai = pytest.importorskip("openai", reason="the extra `serve` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
QUESTION = "what is in the image ?"


@pytest.fixture(scope="module")
def model():
    from helpers.tiny_models import build_config
    from transformers import GenerationConfig

    from modeling_vtlmm import VTLMMForConditionalGeneration

    torch.manual_seed(0)
    model = VTLMMForConditionalGeneration(build_config()).eval()
    scale_weights(model)
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=3)
    model.generation_config.suppress_tokens = [0, 1, 2, 3, model.config.image_token_id, *range(45, 64)]
    return model


@pytest.fixture(scope="module")
def address(model):
    """Start a server in a thread, on a free port of loopback, and yield its address."""
    import uvicorn

    from vtlmm.inference.server import build_app

    app = build_app("user/name", model, build_processor())
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def ask(address):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

    def create(messages, **options):
        return client.chat.completions.create(
            **{"model": "user/name", "max_tokens": 6, "messages": messages, **options}
        )

    create.client = client
    return create


def make_image(color: str) -> Image.Image:
    return Image.new("RGB", (28, 28), color)


def data_uri(color: str) -> str:
    file = io.BytesIO()
    make_image(color).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def messages_about(url: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


TEXT = [{"role": "user", "content": "hello"}]


def expected(model, question: str, *colors: str) -> str:
    images = [make_image(color) for color in colors]
    [answer] = generate(model, build_processor(), question, images, max_new_tokens=6)
    return answer


def test_answers_about_text_and_images(model, ask):
    reply = ask(TEXT)
    assert reply.choices[0].message.content == expected(model, "hello") and reply.usage.completion_tokens == 6
    answers = [ask(messages_about(data_uri(color))).choices[0].message.content for color in ("red", "blue")]
    assert answers == [expected(model, QUESTION, color) for color in ("red", "blue")] and len(set(answers)) == 2
    assert [entry.id for entry in ask.client.models.list().data] == ["user/name"]


def test_streamed_answer(model, ask):
    pieces = [chunk.choices[0].delta.content for chunk in ask(messages_about(data_uri("red")), stream=True)]
    assert "".join(filter(None, pieces)).strip() == expected(model, QUESTION, "red")
    assert len([piece for piece in pieces if piece]) > 1


def test_two_requests_at_the_same_time(model, ask):
    with ThreadPoolExecutor(2) as executor:
        replies = [executor.submit(ask, messages_about(data_uri(color))) for color in ("red", "blue")]
        answers = [reply.result().choices[0].message.content for reply in replies]
    assert answers == [expected(model, QUESTION, color) for color in ("red", "blue")]


def test_responses_route_rejects_image_files(model, ask, tmp_path):
    parts = [{"type": "input_image", "image_url": data_uri("red")}, {"type": "input_text", "text": QUESTION}]
    message = {"role": "user", "content": parts}
    options = {"model": "user/name", "max_output_tokens": 6, "stream": False}
    reply = ask.client.responses.create(input=[message], **options)
    assert reply.output_text == expected(model, QUESTION, "red")
    make_image("red").save(tmp_path / "red.png")
    parts[0]["image_url"] = str(tmp_path / "red.png")
    with pytest.raises(openai.BadRequestError, match="opens no files and no URLs"):
        ask.client.responses.create(input=[message], **options)


INVALID_REQUESTS = {
    "no messages": ({"messages": []}, 400, "no messages"),
    "url": ({"messages": messages_about("http://127.0.0.1:1/a.png")}, 400, "opens no files and no URLs"),
    "file": ({"messages": messages_about(__file__)}, 400, "opens no files and no URLs"),
    "file in the template arguments": (
        {"messages": TEXT, "extra_body": {"chat_template_kwargs": {"images": [__file__]}}},
        400,
        "`chat_template_kwargs` is not supported",
    ),
    "null template arguments": (
        {"messages": TEXT, "extra_body": {"chat_template_kwargs": None}},
        400,
        "`chat_template_kwargs` is not supported",
    ),
    "broken image": ({"messages": messages_about("data:image/png;base64,AAAA")}, 400, "cannot identify image"),
    "no image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "not in the request"),
    "audio": ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "of type 'input_audio'"),
    "part": ({"messages": [{"role": "user", "content": ["hello"]}]}, 400, "of type None"),
    "number": ({"messages": [{"role": "user", "content": 1}]}, 400, "of type None"),
    "no role": ({"messages": [{"content": "hello"}]}, 400, "Message 0 has no role"),
    "role that the template rejects": ({"messages": [{"role": "robot", "content": "x"}]}, 400, "unknown role robot"),
    "tool call": (
        {"messages": [*TEXT, {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}]},
        400,
        "tool call without",
    ),
    "length": ({"messages": TEXT, "max_tokens": -1}, 400, "must be greater than 0"),
    "temperature": ({"messages": TEXT, "extra_body": {"temperature": "hot"}}, 400, "hot"),
    "field": ({"messages": TEXT, "extra_body": {"nonsense": 1}}, 422, "nonsense"),
    "model": ({"messages": TEXT, "model": "another"}, 400, "another"),
}


@pytest.mark.parametrize(("request_", "status", "message"), INVALID_REQUESTS.values(), ids=INVALID_REQUESTS)
def test_invalid_requests(ask, request_, status, message):
    with pytest.raises(openai.APIStatusError) as error:
        ask(**request_)
    assert error.value.status_code == status and message in json.dumps(error.value.body)


def post(url: str, body: bytes) -> tuple[int, str]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_invalid_bodies_and_removed_routes(address, model, ask):
    assert post(f"{address}/v1/chat/completions", b"{")[0] == 422
    assert post(f"{address}/v1/chat/completions", b'{"model": "user/name"}')[0] == 400
    # a client cannot load or unload a model, or open a file or a URL
    removed = "load_model", "reset", "v1/completions", "v1/systemone", "v1/audio/transcriptions"
    assert [post(f"{address}/{route}", b"{}")[0] for route in removed] == [404] * len(removed)
    assert ask(TEXT).choices[0].message.content == expected(model, "hello")


def test_default_host_is_loopback():
    for command in (serve, app):
        assert inspect.signature(command).parameters["host"].default == "127.0.0.1"
