# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Decide who may send requests, and count the answers."""

import hmac
import ipaddress
from collections import Counter

from starlette.datastructures import Headers

from .errors import RequestError
from .settings import ServerSettings


OPEN_PATHS = ("/health",)  # without an API key


def is_loopback(host: str) -> bool:
    """Return whether only this machine can connect to a server that listens at `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Access:
    r"""
    ASGI middleware that rejects requests before they are read.

    - A server that listens at loopback accepts only the host names of loopback. Otherwise a web page could give its
      own name the address 127.0.0.1 and read the answers.
    - Requests with a body must be JSON. Web pages cannot send JSON to other origins without permission (CORS).
    - The API key, if there is one.

    Args:
        app: the ASGI app.
        host (`str`): the address at which the server listens.
        settings ([`ServerSettings`])
        statuses (`Counter`): gets the number of answers by `(path, status)`. Unknown paths count as `other`.
        paths (`set[str]`): known paths.
    """

    def __init__(self, app, host: str, settings: ServerSettings, statuses: Counter, paths: set[str]):
        self.app, self.settings, self.statuses, self.paths = app, settings, statuses, paths
        self.loopback_only = is_loopback(host)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counting_send(message):
            if message["type"] == "http.response.start":
                self.statuses[path, message["status"]] += 1
            await send(message)

        problem = self._problem(scope["method"], scope["path"], Headers(scope=scope))
        if problem is not None:
            return await problem.response()(scope, receive, counting_send)
        return await self.app(scope, receive, counting_send)

    def _problem(self, method: str, path: str, headers: Headers) -> RequestError | None:
        if self.loopback_only and not is_loopback(_without_port(headers.get("host", ""))):
            return RequestError("This server accepts only the host names localhost, 127.0.0.1 and [::1].", 403)
        if self.settings.api_key is not None and path not in OPEN_PATHS:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # Headers are bytes, which Starlette decodes as Latin-1
            is_known = hmac.compare_digest(key.strip().encode("latin-1"), self.settings.api_key.encode())
            if scheme.lower() != "bearer" or not is_known:
                return RequestError("Send the API key as `Authorization: Bearer KEY`.", 401, code="invalid_api_key")
        if method == "POST":
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return RequestError("The body must be JSON. Send `Content-Type: application/json`.", 415)
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length[:20]) > self.settings.max_body_bytes:
                return body_too_large(self.settings)
        return None


def body_too_large(settings: ServerSettings) -> RequestError:
    return RequestError(f"The request has more than {settings.max_body_bytes:,} bytes.", 413)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if ":" in host else host
