# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A tiny model behind `vtlmm serve`'s app on a free port of loopback, and requests for it."""

import base64
import contextlib
import io
import json
import threading
import time

import httpx
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from modeling_vtlmm import VTLMMForConditionalGeneration

from .tiny_models import build_config, build_processor, scale_weights


NAME = "user/name"
QUESTION = "what is in the image ?"


def build_serving_model(**config) -> VTLMMForConditionalGeneration:
    """Return a model whose answers never end early, with words of the test tokenizer only."""
    torch.manual_seed(0)
    model = scale_weights(VTLMMForConditionalGeneration(build_config(**config))).eval()
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=3)
    model.generation_config.suppress_tokens = [0, 1, 2, 3, model.config.image_token_id, *range(45, 64)]
    return model


@contextlib.contextmanager
def running_server(model, host: str = "127.0.0.1", **settings):
    """Yield an `httpx.Client` for a server in a thread, as if it listened at `host`. `client.app` is its app."""
    uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    from vtlmm.inference.server.app import build_app
    from vtlmm.inference.server.settings import ServerSettings

    app = build_app(NAME, model, build_processor(), ServerSettings(**settings), host)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        client.app, client.server = app, server
        yield client
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def data_uri(color: str = "red", side: int = 28, file_format: str = "PNG", header: str = "image/png;base64") -> str:
    file = io.BytesIO()
    Image.new("RGB", (side, side), color).save(file, file_format)
    return f"data:{header},{base64.b64encode(file.getvalue()).decode()}"


def user(text: str = "hello", *urls: str) -> list[dict]:
    """Return the messages of a question about images."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if urls else text}]


def body(messages: list[dict] | None = None, **fields) -> dict:
    """Return the body of a greedy chat completion. A field of `None` is left out."""
    fields = {
        "model": NAME,
        "messages": user() if messages is None else messages,
        "temperature": 0,
        "max_tokens": 6,
        **fields,
    }
    return {name: value for name, value in fields.items() if value is not None}


def complete(client: httpx.Client, messages: list[dict] | None = None, **fields) -> dict:
    reply = client.post("/v1/chat/completions", json=body(messages, **fields))
    assert reply.status_code == 200, reply.text
    return reply.json()


def text_of(reply: dict, index: int = 0) -> str:
    return reply["choices"][index]["message"]["content"]


def stream(client: httpx.Client, messages: list[dict] | None = None, **fields) -> list[dict]:
    """Return the events of a streamed completion, and check its end."""
    reply = client.post("/v1/chat/completions", json=body(messages, stream=True, **fields))
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def joined(events: list[dict], index: int = 0) -> str:
    """Return the text of one answer of a stream."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)
