# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Recognize and read the ways in which datasets store an image: paths, bytes, base64 and structs."""

import base64
import binascii
import os
import re
from typing import Any

from PIL import Image as PILImage


IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jfif", ".ppm"),
    *(".avif", ".heic", ".jp2"),
)
# A relative path without `.`, `..`, `//` or a trailing `/`, which needs no normalization
PLAIN_PATH = re.compile(r"(?:[^/\x00.][^/\x00]*/)*[^/\x00.][^/\x00]*")
MAX_PATH = 4096  # no system accepts a longer path
# Base64 of the first bytes of JPEG, PNG, GIF, WebP, BMP and TIFF
# A text that begins with 60 such characters is base64 too, even if it is damaged later
BASE64_START = re.compile(
    r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk|SUkq|TU0AK)([A-Za-z0-9+/\s]{40,}={0,2}\s*$|[A-Za-z0-9+/]{60})"
)
IMAGE_BYTES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")


def read_image(value: Any, where: str, folder: str | None) -> dict:
    r"""
    Return `{"path", "bytes"}` of an image that a row names or contains. Nothing is opened or decoded.

    Args:
        value: a path, bytes, base64 text, `data:` URI, image from Pillow, or a dict with `bytes`, `path` or `url`.
        where (`str`): names the row in errors.
        folder (`str`, *optional*): absolute folder that relative paths start from. A path that leaves the folder keeps
            its `..`, so that the data check can find it.

    Raises:
        `ValueError`: for a URL, invalid base64, or a relative path without `folder`.
    """
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "base64", "path", "url", "image") if value.get(key)), None)
    if not isinstance(value, str):
        if isinstance(value, bytes | bytearray | memoryview):
            return {"path": None, "bytes": bytes(value)}
        if isinstance(value, PILImage.Image) or hasattr(value, "__array_interface__"):
            from datasets import Image  # imports pandas

            return Image().encode_example(value)
        if not isinstance(value, os.PathLike):
            return {"path": str(value)[:60], "bytes": None}
        value = os.fspath(value)
    if value.startswith("data:") or BASE64_START.match(value) or len(value) > MAX_PATH:
        return {"path": None, "bytes": _decode_base64(value, where)}
    if value.startswith(("http://", "https://")):
        raise ValueError(f"{where}: image {value[:100]!r} is a URL. Download the images and use their paths.")
    if "://" in value and not value.startswith("file://"):  # a streamed Hub dataset
        return {"path": value, "bytes": None}
    value = value.removeprefix("file://")
    if os.path.isabs(value):
        return {"path": os.path.normpath(value), "bytes": None}
    if folder is None:
        raise ValueError(f"{where}: image {value[:100]!r} is a relative path. Set image_folder to its folder.")
    if os.sep == "/" and PLAIN_PATH.fullmatch(value):
        return {"path": os.path.join(folder, value), "bytes": None}
    path = os.path.relpath(os.path.join(folder, value), folder)
    return {"path": os.path.join(folder, path), "bytes": None}


def looks_like_image(value: Any) -> bool:
    """Return whether `value`, or the first value of a list, is an image, or text that names or contains one."""
    if isinstance(value, list | tuple):
        return bool(value) and looks_like_image(value[0])
    if isinstance(value, dict):
        return bool(value) and value.keys() <= {"path", "bytes"} and any(value.values())
    if isinstance(value, bytes | bytearray):
        return bytes(value[:4]).startswith(IMAGE_BYTES)
    return isinstance(value, PILImage.Image) or is_image_text(value)


def is_image_text(value: Any) -> bool:
    """Return whether a text is only an image path, a URL of an image, or base64 of an image."""
    if not isinstance(value, str):
        return False
    if value.startswith("data:image/") or BASE64_START.match(value[:100].strip()):
        return True
    path = value.strip().split("?")[0] if "://" in value else value.strip()
    return "\n" not in path and len(path) < 500 and path.lower().endswith(IMAGE_SUFFIXES) and path.count(" ") < 4


def _decode_base64(text: str, where: str) -> bytes:
    header, comma, content = text.partition(",") if text.startswith("data:") else ("", "", text)
    try:
        if header and (not comma or not header.endswith(";base64")):
            raise binascii.Error("the URI is not base64")
        return base64.b64decode("".join(content.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where}: the image is not valid base64: {error}.") from error
