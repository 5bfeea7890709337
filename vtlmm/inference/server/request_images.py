# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Read the images of a request: data URIs, and https URLs if the server allows them. Never files."""

import base64
import binascii
import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from urllib.parse import SplitResult, unquote_to_bytes, urljoin, urlsplit

from .errors import RequestError
from .settings import ServerSettings


# data:image/png;charset=utf-8;base64,… The image's format comes from its content, not from the media type.
_DATA_URI = re.compile(r"data:(?:image/[\w.+-]+|application/octet-stream)?((?:;[\w.+-]+=[^;,]*)*)(;base64)?,", re.I)
_MAX_REDIRECTS = 3
_FETCH_SECONDS = 15.0
_CHUNK_BYTES = 65_536


def image_bytes(url: str, param: str, settings: ServerSettings) -> bytes:
    r"""
    Return the content of an image in a request.

    Args:
        url (`str`): a data URI or an https URL.
        param (`str`): field of the request, for error messages.

    Raises:
        [`RequestError`]: if the URL has another form, is not allowed, or cannot be fetched.
    """
    if url[:5].lower() == "data:":
        return _decode_data_uri(url, param)
    if not settings.allow_remote_images:
        raise RequestError(
            f"{param}: this server opens no files and no URLs. Send the image as data:image/png;base64,…", param=param
        )
    try:
        return _fetch(url, settings.max_body_bytes)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RequestError(f"{param}: cannot fetch the image: {error}", param=param) from error


def _decode_data_uri(url: str, param: str) -> bytes:
    match = _DATA_URI.match(url[:1000])
    if match is None:
        raise RequestError(
            f"{param}: the data URI must begin with data:image/…;base64, or data:application/octet-stream;base64,",
            param=param,
        )
    data = url[match.end() :]
    if not match[2]:
        return unquote_to_bytes(data)
    try:
        content = base64.b64decode(unquote_to_bytes(data) if "%" in data else data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{param}: the image is not valid base64: {error}.", param=param) from error
    if not content:
        raise RequestError(f"{param}: the data URI has no content.", param=param)
    return content


# ---- Remote images ----


def _fetch(url: str, max_bytes: int) -> bytes:
    """Return the content of an https URL. Raises `ValueError` for an address, status or size that is not allowed."""
    deadline = time.monotonic() + _FETCH_SECONDS
    for _ in range(_MAX_REDIRECTS + 1):
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.username is not None:
            raise ValueError("the URL must be https://host/… without a user name.")
        status, location, content = _get(parts, max_bytes, deadline)
        if status not in (301, 302, 303, 307, 308) or location is None:
            if status != 200:
                raise ValueError(f"the host answered with status {status}.")
            return content
        url = urljoin(url, location)
    raise ValueError(f"there are more than {_MAX_REDIRECTS} redirects.")


def _get(parts: SplitResult, max_bytes: int, deadline: float) -> tuple[int, str | None, bytes]:
    """Return status, `Location` and content of one request. The content of a redirect is not read."""
    connection = _PublicConnection(str(parts.hostname), parts.port or 443, deadline)
    # The time limit of a socket is for each read, so a host that sends single bytes would not reach it
    timer = threading.Timer(max(deadline - time.monotonic(), 0.1), connection.abort)
    timer.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "vtlmm"})
        response = connection.getresponse()
        if response.status != 200:
            return response.status, response.getheader("Location"), b""
        content = bytearray()
        while chunk := response.read1(_CHUNK_BYTES):
            content += chunk
            if len(content) > max_bytes:
                raise ValueError(f"the image has more than {max_bytes:,} bytes.")
        if time.monotonic() >= deadline:  # an aborted connection looks like the end of the content
            raise ValueError("the host needed too long.")
        return response.status, None, bytes(content)
    finally:
        timer.cancel()
        connection.close()


class _PublicConnection(http.client.HTTPSConnection):
    """Connect to the address that was checked. A second look-up of the name could give a private address."""

    def __init__(self, host: str, port: int, deadline: float):
        self._address = public_address(host, port)
        self._tls = ssl.create_default_context()
        self._opened: socket.socket | None = None  # `sock` is None while a last response is read
        super().__init__(host, port, timeout=max(deadline - time.monotonic(), 0.1), context=self._tls)

    def connect(self) -> None:
        connected = socket.create_connection((self._address, self.port), self.timeout)
        self.sock = self._tls.wrap_socket(connected, server_hostname=self.host, do_handshake_on_connect=False)
        self._opened = self.sock
        self.sock.do_handshake()

    def abort(self) -> None:
        """End a read in another thread."""
        if self._opened is not None:
            with contextlib.suppress(OSError):  # closed
                self._opened.shutdown(socket.SHUT_RDWR)


def public_address(host: str, port: int) -> str:
    r"""
    Return an IP address of a host name.

    Raises:
        `ValueError`: if the name has no address, or if one of its addresses is not public.
    """
    try:
        address_infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"the host {host[:100]} was not found.") from error
    addresses = [str(entry[4][0]) for entry in address_infos]
    for address in addresses:
        ip = ipaddress.ip_address(address.split("%")[0])
        inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None) or ip
        nat64 = ip.version == 6 and ip in ipaddress.ip_network("64:ff9b::/96")
        if not ip.is_global or not inner.is_global or ip.is_multicast or nat64:
            raise ValueError(f"the host {host[:100]} has an address that is not public.")
    return addresses[0]
