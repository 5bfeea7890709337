# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Serve one loaded model with the server of `transformers serve`.

The server of transformers would load any model that a request names, open any file or URL that a request names as an
image, and answer invalid requests with status 500. The classes below change this.
"""

import re
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseHandler, GenerationState, Modality


# The other routes of `transformers serve` read images from files and URLs, or load and unload models.
ROUTES = {"/v1/chat/completions", "/v1/responses", "/v1/models", "/health"}
DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")


class OneModel(ModelManager):
    """
    Manager of one loaded model. It never loads another model.

    Args:
        name (`str`): the model's name in requests.
        model, processor: see [`load_model`].
    """

    def __init__(self, name: str, model, processor):
        self.name, self.model, self.processor = name, model, processor
        super().__init__(force_model=name)

    def load_model_and_processor(self, model_id_and_revision: str, *args, **kwargs):
        """Return the model and its processor, or raise a `ValueError` for the name of another model."""
        if model_id_and_revision != self.process_model_name(self.name):
            raise ValueError(f"This server has only the model {self.name}, not {model_id_and_revision}.")
        return self.model, self.processor

    @staticmethod
    def get_model_modality(model, processor=None) -> Modality:
        """Return `Modality.VLM`. The server of transformers would look up the class in its tables of classes."""
        return Modality.VLM

    def list_models(self, cache_dir: str | None = None) -> list[dict]:
        """Return the entry of the model for `/v1/models`."""
        return [{**entry, "status": {"value": "loaded"}} for entry in super().list_models(cache_dir)]


if TYPE_CHECKING:
    _Handler = BaseHandler
else:
    _Handler = object  # a mixin: BaseHandler comes from the other base class


class RequestImagesMixin(_Handler):
    """Accept only images that are inside the request, and raise a `ValueError` that names an invalid part of it."""

    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)
        if not (body.get("messages") or body.get("input") or body.get("previous_response_id")):
            raise ValueError("The request has no messages.")
        if "chat_template_kwargs" in body:  # the processor gets them too, and its `images` could be files
            raise ValueError("`chat_template_kwargs` is not supported. Remove it.")

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Modality) -> list[dict]:
        """Check the messages, and return them as the processor reads them."""
        if not isinstance(messages, list):
            raise ValueError("`messages` must be a list.")
        for number, message in enumerate(messages):
            _check_message(message, number)
        return BaseHandler.get_processor_inputs_from_messages(messages, modality)


def _check_message(message: Any, number: int) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"Message {number} has no role.")
    for call in message.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not {"name", "arguments"} <= function.keys():
            raise ValueError(f"Message {number} has a tool call without the name and arguments of a function.")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    for part in content if isinstance(content, list) else [content]:
        _check_part(part, number)


def _check_part(part: Any, number: int) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise ValueError(f"Message {number} has a text part without a text.")
    elif kind in ("image_url", "input_image"):
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str) or not DATA_URI.match(url):
            raise ValueError(
                f"Message {number} has an image that is not in the request. This server opens no files and no URLs. "
                "Send the image as data:image/png;base64,…"
            )
    else:
        raise ValueError(f"Message {number} has a part of type {kind!r}. Supported types: text and image_url.")


class ChatHandler(RequestImagesMixin, ChatCompletionHandler):
    """Handler of `/v1/chat/completions`."""


class CheckedResponseHandler(RequestImagesMixin, ResponseHandler):
    """Handler of `/v1/responses`."""


def build_app(name: str, model, processor, compile: bool = False) -> FastAPI:
    r"""
    Return an app with the routes `ROUTES` of `transformers serve` (5.24) for one model.

    Args:
        name (`str`): the model's name in requests.
        model, processor: a VT-LMM or a LLaVA exported from it.
        compile (`bool`, *optional*, defaults to `False`): generate with a static cache, compiled on a GPU.
    """
    manager = OneModel(name, model, processor)
    state = GenerationState(compile=compile)
    app = build_server(
        manager,
        ChatHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        response_handler=CheckedResponseHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]

    async def bad_request(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    for error_type in (ValueError, TemplateError):  # a chat template raises TemplateError for an invalid conversation
        app.add_exception_handler(error_type, bad_request)
    return app
