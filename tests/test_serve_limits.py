# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Limits of the server, cancelled requests, slow connections, and who may connect."""

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.serving import (
    QUESTION,
    body,
    build_serving_model,
    complete,
    data_uri,
    running_server,
    user,
)


# Long enough that no test waits for their end: a step takes a millisecond or more
LONG = {"max_tokens": 20_000}
REQUEST_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def model():
    model = build_serving_model()
    model.config.text_config.max_position_embeddings = 100_000
    return model


@pytest.fixture
def serve(model):
    """Function of settings that gives the client of a server."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(
            running_server(model, **{"max_answer_tokens": 20_000, **settings})
        )


def scheduler_of(client):
    return client.app.state.completions.scheduler


def wait_until(condition, seconds: float = 60) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.005)


def open_connection(client, fields: dict) -> socket.socket:
    """Send a request over a separate socket, and do not read the answer."""
    connection = socket.create_connection(("127.0.0.1", client.base_url.port))
    content = json.dumps(body(**fields)).encode()
    connection.sendall(REQUEST_HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3, "temperature": 1}], ids=["reply", "stream", "n"])
def test_disconnected_client_frees_the_model_within_a_second(serve, fields):
    client = serve()
    scheduler = scheduler_of(client)
    with ThreadPoolExecutor(1) as executor:
        neighbor = executor.submit(complete, client, max_tokens=300)
        connection = open_connection(client, {**LONG, **fields})
        wait_until(lambda: scheduler.num_running >= 2)
        started = time.process_time()  # the neighbor computes
        connection.close()
        wait_until(lambda: scheduler.num_running <= 1)
        assert time.process_time() - started < 1
        assert neighbor.result()["usage"]["completion_tokens"] == 300
    assert scheduler.statistics.cancelled == 1
    wait_until(lambda: scheduler.num_running == 0)


def test_waiting_request_of_a_disconnected_client_is_removed(serve):
    client = serve(max_batch_size=1)
    scheduler = scheduler_of(client)
    first, second = open_connection(client, LONG), open_connection(client, LONG)
    wait_until(lambda: scheduler.num_running + scheduler.num_waiting == 2)
    second.close()
    wait_until(lambda: scheduler.num_waiting == 0)
    first.close()
    wait_until(lambda: scheduler.num_running == 0)


def test_full_queue_gives_429(serve):
    client = serve(max_batch_size=1, max_queue=2)
    scheduler = scheduler_of(client)
    connections = [open_connection(client, LONG)]
    wait_until(lambda: scheduler.num_running == 1)
    connections += [open_connection(client, LONG) for _ in range(2)]
    wait_until(lambda: scheduler.num_waiting == 2)
    reply = client.post("/v1/chat/completions", json=body())
    assert reply.status_code == 429 and int(reply.headers["retry-after"]) >= 1
    assert reply.json()["error"]["type"] == "rate_limit_error"
    for connection in connections:
        connection.close()
    wait_until(lambda: scheduler.num_running + scheduler.num_waiting == 0)
    complete(client)


def test_time_limit_of_a_request(serve):
    client = serve(request_seconds=0.4)
    started = time.monotonic()
    reply = client.post("/v1/chat/completions", json=body(**LONG))
    assert reply.status_code == 504 and reply.json()["error"]["code"] == "timeout"
    assert time.monotonic() - started > 0.3
    # the status of a stream was sent before, so the error is its last event
    lines = client.post("/v1/chat/completions", json=body(stream=True, **LONG)).text.strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout" and len(lines) > 1
    wait_until(lambda: scheduler_of(client).num_running == 0)


def test_slow_and_idle_connections_do_not_block_others(serve):
    client = serve(max_queue=4)
    port = client.base_url.port
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
    for connection in idle[:25]:  # half of the connections send the start of a request
        connection.sendall(REQUEST_HEAD + b"Content-Length: 1000\r\n\r\n{")
    streams = [open_connection(client, {**LONG, "stream": True}) for _ in range(2)]  # the answers are not read
    for _ in range(5):
        complete(client)
    for connection in [*idle, *streams]:
        connection.close()
    wait_until(lambda: scheduler_of(client).num_running == 0)


def test_large_bodies_are_rejected_before_they_are_read(serve):
    client = serve(max_body_bytes=10_000)
    assert client.post("/v1/chat/completions", json=body(user("a" * 10_000))).status_code == 413

    def chunks():
        for _ in range(100):
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    reply = client.post("/v1/chat/completions", content=chunks(), headers=headers)
    assert reply.status_code == 413 and "10,000 bytes" in reply.json()["error"]["message"]
    complete(client)


def test_prompt_and_image_limits(serve):
    client = serve(max_prompt_tokens=10, max_images=1, max_image_pixels=27 * 28)
    fields = {"code": "context_length_exceeded"}
    reply = client.post("/v1/chat/completions", json=body(user(QUESTION)))
    assert reply.status_code == 400 and reply.json()["error"].items() >= fields.items()
    reply = client.post("/v1/chat/completions", json=body(user("a", data_uri())))
    assert "756" in reply.json()["error"]["message"]
    reply = client.post("/v1/chat/completions", json=body(user("a", data_uri(), data_uri())))
    assert reply.json()["error"]["code"] == "too_many_images"


def test_answer_ends_at_the_position_limit():
    model = build_serving_model()
    model.config.text_config.max_position_embeddings = 20
    with running_server(model) as client:
        reply = complete(client, max_tokens=1000)
        assert reply["usage"]["total_tokens"] == 20 and reply["choices"][0]["finish_reason"] == "length"
        assert client.post("/v1/chat/completions", json=body(user("hello " * 20))).status_code == 400


def test_shutdown_cancels_what_does_not_finish(model):
    with running_server(model, max_answer_tokens=20_000) as client:
        scheduler = scheduler_of(client)
        connection = open_connection(client, LONG)
        wait_until(lambda: scheduler.num_running == 1)
    # `running_server` waits for the end of the server's thread
    assert scheduler.num_running == 0 and not scheduler._thread.is_alive()
    connection.close()


def test_short_request_finishes_during_a_long_one(serve):
    client = serve()
    scheduler = scheduler_of(client)
    connection = open_connection(client, LONG)
    wait_until(lambda: scheduler.num_running == 1)
    complete(client)
    wait_until(lambda: scheduler.num_running == 1)  # the long request continues
    connection.close()
    wait_until(lambda: scheduler.num_running == 0)


# ---- Access ----


def test_host_names(serve):
    client = serve()
    for host in ("localhost", "127.0.0.1:80", "[::1]:8000", "LOCALHOST:1"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    for host in ("example.com", "127.0.0.1.example.com", "localhost.example.com:8000", "10.0.0.1", ""):
        assert client.get("/health", headers={"Host": host}).status_code == 403


def test_other_host_names_of_a_public_server(serve):
    client = serve(host="0.0.0.0")
    for host in ("example.com", "[", "a b", "\x7f", ""):
        assert client.get("/health", headers={"Host": host}).status_code in (200, 400)
        assert client.get("/nothing/", headers={"Host": host}).status_code in (404, 400)
        assert client.get("/health/", headers={"Host": host}).status_code in (404, 400)


def test_content_type(serve):
    client = serve()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):  # what a web page may send without a question
        reply = client.post("/v1/chat/completions", content=json.dumps(body()), headers={"Content-Type": kind})
        assert reply.status_code == 415
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert client.post("/v1/chat/completions", content=json.dumps(body()), headers=headers).status_code == 200


def test_api_key(serve):
    client = serve(api_key="secret é")
    assert client.get("/health").status_code == 200
    for key in (None, "Bearer", "Bearer secret", "Basic secret", b"Bearer \xff"):
        headers = {} if key is None else {"Authorization": key}
        assert client.get("/v1/models", headers=headers).status_code == 401
        assert client.post("/v1/chat/completions", json=body(), headers=headers).status_code == 401
    headers = {"Authorization": "Bearer secret é".encode()}
    assert client.get("/v1/models", headers=headers).status_code == 200
    assert client.get("/metrics", headers=headers).status_code == 200


def test_cors(serve):
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    headers = {"Origin": "https://page.example", **preflight}
    client = serve()
    reply = client.options("/v1/chat/completions", headers=headers)
    assert reply.status_code == 405 and "access-control-allow-origin" not in reply.headers
    client = serve(allow_origins=("https://page.example",), api_key="key")
    reply = client.options("/v1/chat/completions", headers=headers)
    assert reply.headers["access-control-allow-origin"] == "https://page.example"
    other = client.options("/v1/chat/completions", headers={**headers, "Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
