# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The server of `transformers serve`, for one model that is loaded already.

By itself it looks classes up in transformers' own tables, loads whatever a request names, answers a request that it
cannot read with status 500, and opens files and addresses that a request names as images.
"""

import re

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


# The others of `transformers serve` take images from files and addresses, or load and forget models.
ROUTES = {"/v1/chat/completions", "/v1/responses", "/v1/models", "/health"}
DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")


class OneModel(ModelManager):
    """Gives the model that it was made with, by the name `name`, and never loads another."""

    def __init__(self, name: str, model, processor):
        self.name, self.model, self.processor = name, model, processor
        super().__init__(force_model=name)

    def load_model_and_processor(self, model_id_and_revision: str, *args, **kwargs):
        if model_id_and_revision != self.process_model_name(self.name):
            raise ValueError(f"This server has {self.name} only, not {model_id_and_revision}.")
        return self.model, self.processor

    @staticmethod
    def get_model_modality(model, processor=None) -> Modality:
        return Modality.VLM

    def list_models(self, cache_dir=None) -> list[dict]:
        return [{**entry, "status": {"value": "loaded"}} for entry in super().list_models(cache_dir)]


class ReadsImagesFromRequests:
    """A handler that takes no image but those in the request itself, and names what it cannot read."""

    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)
        if not (body.get("messages") or body.get("input") or body.get("previous_response_id")):
            raise ValueError("The request has no messages.")
        if "chat_template_kwargs" in body:  # they would reach the processor too, whose `images` may be files
            raise ValueError("`chat_template_kwargs` are not taken: the chat template is the model's own.")

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality: Modality) -> list[dict]:
        if not isinstance(messages, list):
            raise ValueError("`messages` must be a list.")
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ValueError(f"Message {number} has no role.")
            for call in message.get("tool_calls") or []:
                function = call.get("function") if isinstance(call, dict) else None
                if not isinstance(function, dict) or not {"name", "arguments"} <= function.keys():
                    raise ValueError(f"Message {number} has a tool call without a function's name and arguments.")
            content = message.get("content")
            if isinstance(content, str) or content is None:
                continue
            for part in content if isinstance(content, list) else [content]:
                _check_part(part, number)
        return BaseHandler.get_processor_inputs_from_messages(messages, modality)


def _check_part(part, number: int) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise ValueError(f"Message {number} has a part without a text.")
    elif kind in ("image_url", "input_image"):
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str) or not DATA_URI.match(url):
            raise ValueError(
                f"Message {number} has a image that is not in the request: send it as data:image/png;base64,… This "
                "server opens no files and no addresses for its clients."
            )
    else:
        raise ValueError(f"Message {number} has a part of type {kind!r}: only text and image_url are read.")


class ChatHandler(ReadsImagesFromRequests, ChatCompletionHandler):
    pass


class AnswerHandler(ReadsImagesFromRequests, ResponseHandler):
    pass


def build_app(name: str, model, processor, compile: bool = False) -> FastAPI:
    r"""
    The routes `ROUTES` of `transformers serve` (5.24) for a model; it has no other.

    Args:
        name (`str`): by which requests call the model.
        model, processor: a VT-LMM or its native twin.
        compile (`bool`, *optional*, defaults to `False`): decode with a static cache, compiled on a GPU.
    """
    manager = OneModel(name, model, processor)
    state = GenerationState(compile=compile)
    app = build_server(
        manager,
        ChatHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        response_handler=AnswerHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )

    app.router.routes[:] = [route for route in app.router.routes if route.path in ROUTES]

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    for kind in (ValueError, TemplateError):  # a template says so which conversations it has no words for
        app.add_exception_handler(kind, refuse)
    return app
