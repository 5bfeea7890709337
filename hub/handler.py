# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Answer requests in Hugging Face Inference Endpoints. The endpoint loads this file from the model's repository.

A request is `{"inputs": {"text": "What is this?", "image": "<base64>"}, "parameters": {"max_new_tokens": 64}}`, the
image is optional. The answer is `[{"generated_text": "A boat."}]`.
"""

import base64
import binascii
import io
from typing import Any

from PIL import Image
from transformers import pipeline


class EndpointHandler:
    """Load the model in the folder `path` with `trust_remote_code`, and answer requests."""

    def __init__(self, path: str = ""):
        self.pipeline: Any = pipeline("image-text-to-text", model=path, dtype="auto", trust_remote_code=True)

    def __call__(self, data: dict[str, Any]) -> list[dict[str, str]]:
        """Return the answer to one request, or `[{"error": …}]` for invalid inputs."""
        inputs, parameters = data.get("inputs"), dict(data.get("parameters") or {})
        if isinstance(inputs, str):
            inputs = {"text": inputs}
        if not isinstance(inputs, dict) or not isinstance(inputs.get("text"), str):
            return [{"error": 'Send {"inputs": {"text": "…", "image": "<base64>"}}. The image is optional.'}]
        content: list[dict[str, Any]] = [{"type": "text", "text": inputs["text"]}]
        if inputs.get("image") is not None:
            try:
                encoded = inputs["image"].partition("base64,")[2] or inputs["image"]
                image = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))).convert("RGB")
            except (AttributeError, OSError, binascii.Error):
                return [{"error": "`image` is not a base64-encoded image."}]
            content.insert(0, {"type": "image", "image": image})
        parameters.setdefault("max_new_tokens", 256)
        [answer] = self.pipeline(
            text=[[{"role": "user", "content": content}]], return_full_text=False, generate_kwargs=parameters
        )[0]
        return [{"generated_text": answer["generated_text"]}]
