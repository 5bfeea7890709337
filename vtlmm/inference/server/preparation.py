# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Turn the body of a chat completion into a request for the scheduler. Everything invalid is found here."""

import logging
import threading
from typing import Any

import pydantic_core
from PIL import Image
from pydantic import ValidationError

from vtlmm.data.encoding import position_limit
from vtlmm.data.images import ImageError
from vtlmm.inference.batch_inputs import VisionFeatures, image_inputs, image_pixels
from vtlmm.inference.generation import build_prompt
from vtlmm.inference.prompt_encoding import Prompt, encode_prompt
from vtlmm.inference.sampling import Sampling
from vtlmm.inference.scheduler import GenerationRequest

from .errors import RequestError, invalid_fields
from .request_images import image_bytes
from .schema import ChatRequest, ImagePart
from .settings import ServerSettings


logger = logging.getLogger(__name__)

# Decoding needs several copies of the pixels, up to 250 MB with the default limit.
_one_image_at_a_time = threading.Lock()


def parse_chat_request(body: bytes, settings: ServerSettings, name: str) -> ChatRequest:
    r"""
    Return the fields of a request.

    Args:
        name (`str`): the model's name in requests.

    Raises:
        [`RequestError`]: for invalid JSON, another model, and a field that is unsupported, invalid or above a limit.
    """
    try:
        data = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from error
    try:
        chat = ChatRequest.model_validate(data)
    except ValidationError as error:
        raise invalid_fields(error, data) from error
    if chat.model != name:
        message = f"The model {chat.model[:100]!r} does not exist. This server has {name!r}."
        raise RequestError(message, 404, "model", "model_not_found")
    if (chat.token_limit or 0) > settings.max_answer_tokens:
        param = "max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens"
        raise RequestError(f"{param}: at most {settings.max_answer_tokens} tokens are allowed.", param=param)
    if (chat.n or 1) > settings.max_batch_size:
        raise RequestError(f"n: at most {settings.max_batch_size} answers are allowed.", param="n")
    number = sum(isinstance(part, ImagePart) for _, _, part in _parts(chat))
    if number > settings.max_images:
        message = f"The request has {number} images. At most {settings.max_images} are allowed."
        raise RequestError(message, param="messages", code="too_many_images")
    return chat


def _parts(chat: ChatRequest):
    """Yield the number of a message, the number of a part, and the part, for messages whose content is a list."""
    for i, message in enumerate(chat.messages):
        if not isinstance(message.content, str):
            for j, part in enumerate(message.content):
                yield i, j, part


def read_images(chat: ChatRequest, settings: ServerSettings) -> list[bytes]:
    """Return the content of the request's images, in their order. Remote images are fetched."""
    return [
        image_bytes(part.image_url.url, f"messages.{i}.content.{j}.image_url", settings)
        for i, j, part in _parts(chat)
        if isinstance(part, ImagePart)
    ]


class RequestPreparation:
    r"""
    Encode requests for one model. The methods may be called from several threads.

    Args:
        model, processor: see [`load_model`].
        settings ([`ServerSettings`])
        vision_features ([`VisionFeatures`]): of the scheduler. Images in it are not decoded again.
    """

    def __init__(self, model, processor, settings: ServerSettings, vision_features: VisionFeatures):
        self.processor, self.settings, self.vision_features = processor, settings, vision_features
        self.max_length = position_limit(model.config) or settings.max_prompt_tokens + settings.max_answer_tokens
        self.max_prompt_tokens = min(settings.max_prompt_tokens, self.max_length - 1)
        # Longer texts have too many tokens in any case, and take long to tokenize
        self.max_characters = self.max_prompt_tokens * max(map(len, processor.tokenizer.get_vocab()))
        [features] = image_inputs(model, processor, [""], lambda key: Image.new("RGB", (32, 32)), {}).values()
        self.tokens_per_image = len(features)

    def prepare(self, chat: ChatRequest, contents: list[bytes]) -> GenerationRequest:
        r"""
        Return a request for the scheduler, without a receiver.

        Args:
            chat ([`ChatRequest`])
            contents (`list[bytes]`): its images, from [`read_images`].

        Raises:
            [`RequestError`]: if an image cannot be read, or if the prompt is too long or has another invalid form.
        """
        messages, texts = _messages(chat, contents)
        if sum(map(len, texts)) > self.max_characters:
            raise self._too_long(f"The messages have more than {self.max_characters:,} characters.")
        sources: dict[str, Any] = {}
        prompt = build_prompt(messages, None, sources)
        token_ids = self._encode(prompt)
        num_tokens = len(token_ids) + len(prompt.images) * (self.tokens_per_image - 1)
        if num_tokens > self.max_prompt_tokens:
            raise self._too_long(f"The prompt has {num_tokens} tokens with its images.")
        limit = chat.token_limit or self.settings.max_answer_tokens
        return GenerationRequest(
            token_ids=token_ids,
            image_keys=prompt.images,
            images={key: self._image(key, content) for key, content in sources.items()},
            num_tokens=num_tokens,
            max_new_tokens=min(limit, self.max_length - num_tokens),
            receive=lambda event: None,
            sampling=Sampling(
                temperature=1.0 if chat.temperature is None else chat.temperature,
                top_p=1.0 if chat.top_p is None else chat.top_p,
                seed=chat.seed,
                frequency_penalty=chat.frequency_penalty or 0.0,
                presence_penalty=chat.presence_penalty or 0.0,
            ),
            num_answers=chat.n or 1,
            stop=chat.stop_strings,
            num_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
            is_streamed=bool(chat.stream),
        )

    def _encode(self, prompt: Prompt) -> list[int]:
        try:
            token_ids = encode_prompt(self.processor, prompt.messages)
        except Exception as error:  # a chat template raises many types, e.g. for a role that it does not have
            logger.info("A prompt cannot be encoded", exc_info=error)
            message = f"messages: the model's chat template does not accept them: {str(error)[:300]}"
            raise RequestError(message, param="messages") from error
        number = token_ids.count(self.processor.image_token_id)
        if number != len(prompt.images):
            message = f"messages: the chat template writes {number} image tokens for {len(prompt.images)} images."
            raise RequestError(message, param="messages")
        return token_ids

    def _image(self, key: str, content: bytes) -> Any:
        """Return the pixels of an image, or its content if its vision features are known."""
        if key in self.vision_features:
            return content
        try:
            with _one_image_at_a_time:
                return image_pixels(self.processor, content, self.settings.max_image_pixels)
        except (ImageError, ValueError) as error:
            raise RequestError(f"messages: {error}", param="messages", code="invalid_image") from error

    def _too_long(self, problem: str) -> RequestError:
        message = f"messages: {problem} At most {self.max_prompt_tokens} tokens are allowed. Shorten the messages."
        return RequestError(message, param="messages", code="context_length_exceeded")


def _messages(chat: ChatRequest, contents: list[bytes]) -> tuple[list[dict], list[str]]:
    """Return the messages as [`build_prompt`] reads them, and their texts."""
    remaining, messages, texts = iter(contents), [], []
    for message in chat.messages:
        parts: list[dict] = []
        if isinstance(message.content, str):
            parts.append({"type": "text", "text": message.content})
        else:
            for part in message.content:
                if isinstance(part, ImagePart):
                    parts.append({"type": "image", "image": next(remaining)})
                else:
                    parts.append({"type": "text", "text": part.text})
        texts += [part["text"] for part in parts if part["type"] == "text"]
        messages.append({"role": message.role, "content": parts})
    return messages, texts
