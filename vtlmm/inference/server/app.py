# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The routes of the server."""

import contextlib
import logging
import time
from collections import Counter
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from .access import Access, is_loopback
from .chat import ChatCompletions
from .errors import RequestError
from .metrics import CONTENT_TYPE, metrics_text
from .settings import ServerSettings


logger = logging.getLogger(__name__)


def build_app(name: str, model, processor, settings: ServerSettings | None = None, host: str = "127.0.0.1") -> FastAPI:
    r"""
    Return an app with a part of OpenAI's API for one model. It starts a thread for the model.

    Args:
        name (`str`): the model's name in requests.
        model, processor: a VT-LMM or a LLaVA exported from it, see [`load_model`].
        settings ([`ServerSettings`], *optional*)
        host (`str`, *optional*, defaults to `"127.0.0.1"`): the address at which the server listens.
    """
    settings = settings or ServerSettings()
    completions = ChatCompletions(name, model, processor, settings)
    created = int(time.time())
    statuses: Counter = Counter()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        completions.close()

    no_pages: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None, "redirect_slashes": False}
    app = FastAPI(title="vtlmm", lifespan=lifespan, **no_pages)
    app.state.completions = completions

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return await completions.answer(request)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [_model_entry(name, created)]}

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str):
        if model_id != name:
            raise RequestError(f"The model {model_id[:100]!r} does not exist.", 404, "model", "model_not_found")
        return _model_entry(name, created)

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics():
        text = metrics_text(completions.scheduler, statuses, completions.seconds)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    _add_error_handlers(app)
    paths = {"/v1/chat/completions", "/v1/models", "/health", "/metrics"}
    app.add_middleware(Access, host=host, settings=settings, statuses=statuses, paths=paths)
    if settings.allow_origins:  # the last middleware is the first to see a request: a preflight has no API key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _model_entry(name: str, created: int) -> dict:
    return {"id": name, "object": "model", "created": created, "owned_by": "vtlmm"}


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)  # an unknown path or method
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return RequestError(
            f"{request.method} {request.scope['path'][:100]}: {error.detail}.", error.status_code
        ).response()

    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception) -> JSONResponse:
        return RequestError("The server failed to answer. Its log has the reason.", 500).response()


def run_server(app: FastAPI, host: str, port: int, shutdown_seconds: int = 30) -> None:
    r"""
    Listen until SIGINT or SIGTERM. Then running requests have `shutdown_seconds` to finish; later they are cancelled.

    Args:
        app (`FastAPI`): from [`build_app`].
    """
    completions = app.state.completions
    if not is_loopback(host) and completions.settings.api_key is None:
        logger.warning("Everyone who can reach %s can use the model. Set an API key with `--api-key`.", host)
    address = f"[{host}]" if ":" in host else host
    print(f"{completions.name} answers at http://{address}:{port}/v1", flush=True)
    # Access logs are off: they would hold the addresses of clients.
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=shutdown_seconds,
    )
