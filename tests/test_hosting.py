# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The handler of Inference Endpoints and the app of a Space run on this machine."""

import base64
import inspect
import io
import json
import runpy
from pathlib import Path

import pytest
from helpers.tiny_models import build_processor
from PIL import Image

from vtlmm import generate, load_model
from vtlmm.hub.handler import EndpointHandler
from vtlmm.hub.isolated_load import run_without_package
from vtlmm.hub.push import push_model
from vtlmm.hub.repository import HANDLER_FILE, foreign_code
from vtlmm.hub.space import write_space


HANDLER = Path(inspect.getfile(EndpointHandler))
CALL = """
import json, sys
sys.path.insert(0, sys.argv[1])
from handler import EndpointHandler
handler = EndpointHandler(sys.argv[1])
print("ANSWERS" + json.dumps([handler(request) for request in json.load(sys.stdin)]))
"""


@pytest.fixture
def folder(build_model, tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    build_processor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.slow
def test_handler_answers_without_the_package(folder, tmp_path):
    """With an image, as a data URI, and with text only: the answers of `generate`."""
    (folder / HANDLER_FILE).write_bytes(HANDLER.read_bytes())
    image, question, limit = Image.new("RGB", (40, 30), "red"), "what is it ?", {"max_new_tokens": 4}
    url = f"data:image/png;base64,{encoded(image)}"
    inputs = [{"text": question, "image": encoded(image)}, {"text": question, "image": url}, question]
    requests = [{"inputs": value, "parameters": limit} for value in inputs]
    (tmp_path / "work").mkdir()
    done = run_without_package(CALL, folder, folder=tmp_path / "work", input=json.dumps(requests))
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [answer["generated_text"].strip() for [answer] in json.loads(done.stdout.partition("ANSWERS")[2])]
    model, processor = load_model(folder)
    expected = [generate(model, processor, question, shown, **limit)[0].strip() for shown in (image, image, None)]
    assert answers == expected and all(answers)


def test_handler_names_invalid_inputs():
    handler = EndpointHandler.__new__(EndpointHandler)  # it answers these before it uses the model
    for inputs in (None, 3, {"image": "x"}, {"text": 3}):
        assert "Send" in handler({"inputs": inputs})[0]["error"]
    for image in (3, "no base64!", base64.b64encode(b"no image").decode()):
        assert "base64-encoded image" in handler({"inputs": {"text": "what ?", "image": image}})[0]["error"]


def test_only_an_unchanged_handler_is_known_code(folder):
    (folder / HANDLER_FILE).write_bytes(HANDLER.read_bytes())
    assert foreign_code(folder) == []
    (folder / HANDLER_FILE).write_bytes(HANDLER.read_bytes() + b"\n")
    assert foreign_code(folder) == ["handler.py differs from the installed package"]


@pytest.mark.slow
def test_dry_run_lists_the_handler(folder):
    result = push_model(folder, "user/name", license="mit", handler=True, space="user/page", dry_run=True)
    assert result.report.problems == [] and HANDLER_FILE in result.files and result.space_url is None
    assert not (folder / HANDLER_FILE).exists()


@pytest.mark.slow
def test_app_of_a_space_builds_the_page(folder, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    launched = []
    monkeypatch.setattr("vtlmm.analysis.app.launch", lambda page, *address: launched.append((page, address)))
    write_space(tmp_path / "space", str(folder), "A model")
    runpy.run_path(str(tmp_path / "space" / "app.py"), run_name="__main__")
    [(page, address)] = launched
    assert type(page).__name__ == "Blocks" and address == ("0.0.0.0", 7860)
