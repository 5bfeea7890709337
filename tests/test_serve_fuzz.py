# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""500 malformed requests: no status 500, no slow answer, and no growing memory."""

import base64
import io
import json
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers.serving import QUESTION, body, build_serving_model, complete, data_uri, running_server, text_of, user
from PIL import Image


NUM_REQUESTS, MAX_SECONDS, MAX_MIB = 500, 2.0, 300
STATM = Path("/proc/self/statm")
FIELDS = (
    *("model", "messages", "temperature", "top_p", "n", "stop", "seed", "max_tokens", "max_completion_tokens"),
    *("logprobs", "top_logprobs", "frequency_penalty", "presence_penalty", "stream", "stream_options"),
    *("tools", "response_format", "user", "images", "chat_template_kwargs", "", "\x00"),
)
VALUES = (
    *(None, True, False, 0, -1, 1, 10**30, -0.0, 1e308, 5e-324, "", "a", "\x00", "\ue0000\ue001", "<image>", "</s>"),
    *([], {}, [[]], [None], {"a": 1}, ["a"] * 10_000, "x" * 100_000, "\u2028", "😀", {"include_usage": 1}, "file:///"),
)


def resident_mib() -> float:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def broken_image(rng: random.Random) -> bytes:
    """Return an image file with changed, missing or extra bytes, or with an extreme size or mode."""
    size = rng.choice([(1, 1), (28, 28), (1, 4000), (4000, 1), (600, 500)])
    mode, file_format = rng.choice([("RGB", "PNG"), ("L", "JPEG"), ("RGBA", "WEBP"), ("P", "GIF"), ("I;16", "PNG")])
    file = io.BytesIO()
    Image.new(mode, size).save(file, file_format)
    content = bytearray(file.getvalue())
    kind = rng.randrange(5)
    if kind == 0:
        content = content[: rng.randrange(len(content))]
    elif kind == 1:
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif kind == 2 and file_format == "PNG":  # another size in the header
        content[16:24] = rng.randbytes(8)
    elif kind == 3:
        content += rng.randbytes(1000)
    return bytes(content)


def random_part(rng: random.Random):
    text = {"type": "text", "text": QUESTION}
    headers = (
        "image/png;base64",
        "application/octet-stream;base64",
        "image/png",
        "image/svg+xml;base64",
        ";base64",
        "",
    )
    content = base64.b64encode(broken_image(rng)).decode()
    url = rng.choice(
        [f"data:{rng.choice(headers)},{content}", "http://[::", "file:///etc/passwd", "//", "data:", content]
    )
    image = {"type": "image_url", "image_url": {"url": url}}
    return rng.choice([text, image, image, image, {**text, "x": 1}, {"type": "image"}, rng.choice(VALUES)])


def random_body(rng: random.Random) -> bytes:
    fields = body()
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.randrange(1, 4)):
            fields[rng.choice(FIELDS)] = rng.choice(VALUES)
    elif kind == 1:
        content = [random_part(rng) for _ in range(rng.randrange(4))]
        fields["messages"] = [{"role": rng.choice(["user", "user", "assistant", "tool", None]), "content": content}]
    elif kind == 2:
        texts = (
            "hello " * rng.randrange(5000),
            "\ue000" * rng.randrange(100),
            "<image>" * 50,
            "\ud7ff\x00",
            "a" * 10**6,
        )
        text = rng.choice(texts)
        fields["messages"] = user(text) * (rng.choice([1, 2, 5000]) if len(text) < 1000 else 1)
    text = json.dumps(fields).encode()
    if kind == 3:  # invalid JSON
        start = rng.randrange(len(text))
        text = rng.choice(
            [text[:start], text[:start] + rng.randbytes(9) + text[start:], b"[" * start, b'{"a":' * 5000]
        )
    return text


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="needs /proc of Linux")
def test_malformed_requests():
    rng = random.Random(0)
    statuses: Counter = Counter()
    with running_server(build_serving_model(), max_answer_tokens=64) as client:
        answer = text_of(complete(client, user(QUESTION, data_uri())))
        start = resident_mib()
        for number in range(NUM_REQUESTS):
            content = random_body(rng)
            started = time.process_time()  # of the client and the server
            reply = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
            seconds = time.process_time() - started
            statuses[reply.status_code] += 1
            assert reply.status_code < 500, (number, content[:1000], reply.text)
            assert reply.status_code == 200 or reply.json()["error"]["message"]
            assert seconds < MAX_SECONDS, (number, content[:1000], seconds)
            assert resident_mib() < start + MAX_MIB, (number, content[:1000])
        assert text_of(complete(client, user(QUESTION, data_uri()))) == answer
    assert statuses[400] > NUM_REQUESTS / 2 and statuses[200] > 20


def large_image(mode: str, file_format: str) -> str:
    file = io.BytesIO()
    Image.new(mode, (4096, 3072)).save(file, file_format)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="needs /proc of Linux")
def test_largest_images_stay_within_the_memory_limit():
    """The largest images that are allowed, in modes whose conversion needs copies."""
    with running_server(build_serving_model()) as client:
        complete(client, user(QUESTION, data_uri()))
        urls = [large_image(mode, "PNG") for mode in ("RGB", "RGBA", "LA", "I;16", "P")]
        start, peak, peaks, is_over = resident_mib(), [0.0], [], threading.Event()

        def measure():
            while not is_over.wait(0.005):
                peak[0] = max(peak[0], resident_mib())

        thread = threading.Thread(target=measure)
        thread.start()
        try:
            for url in urls:
                peak[0] = 0.0
                complete(client, user(QUESTION, url))
                peaks.append(round(peak[0] - start))
        finally:
            is_over.set()
            thread.join()
    assert max(peaks) < MAX_MIB, peaks
