# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Errors of requests, as OpenAI's API reports them."""

from typing import Any

import torch
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from vtlmm.inference.scheduler import ClosedError, QueueFullError


RETRY_AFTER = 1  # seconds


class RequestError(Exception):
    r"""
    A request cannot be answered.

    Args:
        message (`str`): what is wrong, where, and how to fix it.
        status (`int`): HTTP status.
        param (`str`, *optional*): the field of the request.
        code (`str`, *optional*): OpenAI's code of the error.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_AFTER)} if self.status in (429, 503) else None
        return JSONResponse(self.body, self.status, headers)


def as_request_error(error: BaseException) -> RequestError:
    """Return an error of the scheduler as the error of a request. The message of a bug stays in the log."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFullError):
        return RequestError(f"{error} Try again later.", 429, code="queue_full")
    if isinstance(error, TimeoutError):
        return RequestError(f"{error} Ask for fewer tokens.", 504, code="timeout")
    if isinstance(error, ClosedError):
        return RequestError(str(error), 503, code="shutting_down")
    if isinstance(error, torch.OutOfMemoryError):
        return RequestError("The server has too little memory for this request now. Try again later.", 503)
    return RequestError("The server failed to answer. Its log has the reason.", 500)


def invalid_fields(error: ValidationError, data: Any) -> RequestError:
    """Return the most specific problem that pydantic found in `data`, with the name of its field."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    # Of a value that may be a text or a list, pydantic reports the problems of both
    problem = max(
        problems, key=lambda each: (each["type"] == "extra_forbidden", len(each["loc"]), each["type"] != "string_type")
    )
    param = _field_name(problem["loc"], data, problem["type"] == "missing")
    if problem["type"] == "extra_forbidden":
        return RequestError(f"Unsupported field: {param}. Remove it.", param=param, code="unsupported_parameter")
    message = problem["msg"].removeprefix("Value error, ")
    return RequestError(f"{param}: {message}." if param else f"{message}.", param=param, code="invalid_value")


def _field_name(location: tuple[int | str, ...], data: Any, is_missing: bool) -> str | None:
    """Return pydantic's location without its names of classes and types, e.g. `messages.0.content`."""
    names: list[str] = []
    for i, part in enumerate(location):
        is_last = i == len(location) - 1
        is_entry = i > 0 and isinstance(location[i - 1], int) and isinstance(data, dict)
        if is_entry and part in (data.get("role"), data.get("type")) and not is_last:
            continue  # the class of a message or of a part
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]  # type: ignore[index]
            names.append(str(part)[:100])
        elif is_missing and is_last:
            names.append(str(part))
    return ".".join(names) or None
