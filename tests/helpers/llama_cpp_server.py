# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Answer requests with llama.cpp (the package xllamacpp), in a process of its own, for tests/test_gguf_llama_cpp.py.

    python llama_cpp_server.py MODEL MMPROJ REQUESTS REPLIES

REQUESTS is a JSON list of `{"path": "/completion", "body": {…}, "images": [PNG, …]}`. In texts, `<image>` becomes the
server's marker for an image.
"""

import base64
import json
import os
import socket
import sys
import urllib.request
from pathlib import Path

import xllamacpp


def start(model: str, mmproj: str) -> str:
    """Start the server on a free port and return its address. float32 and no GPU, to compare numbers."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.mmproj.path = model, mmproj
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 1024, 1, 1
    parameters.warmup = parameters.mmproj_use_gpu = parameters.cache_prompt = False
    parameters.n_gpu_layers, parameters.verbosity = 0, 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        parameters.port = free.getsockname()[1]
    start.server = xllamacpp.Server(parameters)  # the server ends with its object
    return f"http://127.0.0.1:{parameters.port}"


def send(address: str, path: str, body: dict) -> dict:
    """Return the reply to one request; of a failed request the error."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        return {"error": error.read().decode()}


def body_of(request: dict, marker: str) -> dict:
    """Return the body of a request with its images."""
    body = dict(request["body"])
    images = [base64.b64encode(Path(file).read_bytes()).decode() for file in request.get("images", [])]
    if "prompt" in body:
        text = body["prompt"].replace("<image>", marker)
        body["prompt"] = {"prompt_string": text, "multimodal_data": images} if images else text
    if "messages" in body:
        for message in body["messages"]:
            for part in message["content"]:
                if part["type"] == "image":
                    part.clear()
                    part |= {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{images.pop(0)}"}}
    return body


def main(model: str, mmproj: str, requests: str, replies: str) -> None:
    address = start(model, mmproj)
    with urllib.request.urlopen(f"{address}/props") as reply:
        marker = json.load(reply)["media_marker"]
    found = []
    for request in json.loads(Path(requests).read_text()):
        answer = send(address, request["path"], body_of(request, marker))
        found.append(json.loads(json.dumps(answer).replace(marker, "<image>")))
    Path(replies).write_text(json.dumps(found))
    os._exit(0)  # the server's threads would keep the process


if __name__ == "__main__":
    main(*sys.argv[1:])
