# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Settings of the server."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    r"""
    Limits of the server and who may use it.

    Attributes:
        max_body_bytes (`int`): size of a request.
        max_images (`int`): images in a request.
        max_image_pixels (`int`): width times height of an image. It is checked before the image is decoded.
        max_prompt_tokens, max_answer_tokens (`int`): tokens of a prompt with its image features, and of an answer. The
            decoder's number of positions is a limit too.
        max_batch_size (`int`): answers that are generated at the same time.
        max_queue (`int`): requests that wait for a place in the batch. One more gets status 429.
        request_seconds (`float`): time for a request, with its time in the queue.
        allow_remote_images (`bool`): fetch images from https URLs with public addresses.
        api_key (`str`, *optional*): clients must send it as `Authorization: Bearer KEY`.
        allow_origins (`tuple[str, ...]`): web pages of these origins may call the server. `*` means all.
    """

    max_body_bytes: int = 20_000_000
    max_images: int = 8
    max_image_pixels: int = 4096 * 3072
    max_prompt_tokens: int = 8192
    max_answer_tokens: int = 1024
    max_batch_size: int = 32
    max_queue: int = 128
    request_seconds: float = 300.0
    allow_remote_images: bool = False
    api_key: str | None = None
    allow_origins: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("max_body_bytes", "max_image_pixels", "max_prompt_tokens", "max_answer_tokens", "max_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}. It must be at least 1.")
        if self.max_images < 0 or self.max_queue < 1 or self.request_seconds <= 0:
            raise ValueError("`max_images` must not be negative; `max_queue` and `request_seconds` must be positive.")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("The API key is empty. Set one, or leave the option out.")
