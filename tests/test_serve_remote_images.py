# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Images from https URLs: which addresses are allowed, redirects, and the limits of size and time. No network."""

import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest
from helpers.serving import body, build_serving_model, running_server, user

from vtlmm.inference.server import request_images
from vtlmm.inference.server.errors import RequestError
from vtlmm.inference.server.request_images import image_bytes, public_address
from vtlmm.inference.server.settings import ServerSettings


SETTINGS = ServerSettings(allow_remote_images=True, max_body_bytes=1000)
PRIVATE = (
    *("127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1", "::1", "::"),
    *("fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "fe80::1%1"),
)


def set_addresses(monkeypatch, *addresses: str) -> None:
    """Make all host names have these addresses."""
    found = [(0, 0, 0, "", (address, 443)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(monkeypatch, address):
    set_addresses(monkeypatch, address)
    with pytest.raises(ValueError, match="not public"):
        public_address("image.example", 443)
    set_addresses(monkeypatch, "1.1.1.1", address)  # one of several addresses
    with pytest.raises(ValueError, match="not public"):
        public_address("image.example", 443)


def test_public_addresses(monkeypatch):
    for address in ("1.1.1.1", "2606:4700:4700::1111"):
        set_addresses(monkeypatch, address)
        assert public_address("image.example", 443) == address


def test_urls_that_are_not_allowed():
    urls = [
        "http://example.com/a.png",
        "https://127.0.0.1/a.png",
        "https://localhost/",
        "file:///etc/passwd",
        __file__,
    ]
    urls += [
        "https://user@127.0.0.1/",
        "https://[::1]/",
        "https://0x7f000001/",
        "https://2130706433/",
        "https://[/",
        "",
    ]
    urls += ["https://127.0.0.1:99999/", "ftp://example.com/a.png", "https://", "https://\u2488/", "https://a\nb/"]
    with running_server(build_serving_model(), allow_remote_images=True) as client:
        for url in urls:
            reply = client.post("/v1/chat/completions", json=body(user("", url)))
            assert reply.status_code == 400 and "cannot fetch" in reply.json()["error"]["message"], url


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        replies = {
            "/moved": "/image",
            "/private": "https://private.example/",
            "/http": "http://image.example/",
            "/loop": "/loop",
        }
        if self.path in replies:
            self.send_response(302)
            self.send_header("Location", replies[self.path])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        if self.path == "/slow":
            for _ in range(400):
                self.wfile.write(b"a")
                self.wfile.flush()
                time.sleep(0.05)
        else:
            self.wfile.write(self.headers["Host"].encode() if self.path == "/image" else b"a" * 1001)

    def log_message(self, *args):
        pass


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Return the URL of an https server whose certificate is for `image.example`, which has the address 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    names = ["-subj", "/CN=image.example", "-addext", "subjectAltName=DNS:image.example"]
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "certificate")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # prints that a client ended the connection
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    trusted = ssl.create_default_context(cafile=str(tmp_path / "certificate"))
    monkeypatch.setattr(request_images.ssl, "create_default_context", lambda: trusted)

    def address(host, port):
        if host != "image.example":
            raise ValueError(f"{host} is not public.")
        return "127.0.0.1"

    monkeypatch.setattr(request_images, "public_address", address)
    yield f"https://image.example:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_image_is_fetched_from_the_checked_address(host):
    assert image_bytes(f"{host}/image", "url", SETTINGS) == host.removeprefix("https://").encode()
    assert image_bytes(f"{host}/moved", "url", SETTINGS) == host.removeprefix("https://").encode()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "status 404"),
        ("large", "more than 1,000 bytes"),
        ("private", "not public"),
        ("http", "must be https"),
        ("loop", "redirects"),
    ],
)
def test_image_that_cannot_be_fetched(host, path, message):
    with pytest.raises(RequestError, match=message):
        image_bytes(f"{host}/{path}", "url", SETTINGS)


def test_slow_host(host, monkeypatch):
    monkeypatch.setattr(request_images, "_FETCH_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(RequestError, match="cannot fetch the image"):
        image_bytes(f"{host}/slow", "url", SETTINGS)
    assert time.monotonic() - started < 10  # of 20 s


def test_certificate_must_match_the_host(host, monkeypatch):
    monkeypatch.setattr(request_images, "public_address", lambda *args: "127.0.0.1")
    with pytest.raises(RequestError, match="(?i)certificate"):
        image_bytes(host.replace("image.example", "other.example"), "url", SETTINGS)
