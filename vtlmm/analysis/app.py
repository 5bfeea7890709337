# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A web page to chat about an image and to see the words of its patches."""

import html
import queue
from collections.abc import Iterator
from typing import Any

from vtlmm.data.images import open_image
from vtlmm.data.setting_values import require_integers
from vtlmm.inference.batch_inputs import limit_new_tokens
from vtlmm.inference.generation import build_prompt, conversation
from vtlmm.inference.prompt_encoding import encode_prompt
from vtlmm.inference.scheduler import GenerationRequest, Scheduler

from .patch_features import shown_image
from .visual_token_page import visual_token_page
from .visual_tokens import read_visual_tokens


MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS = 20_000_000, 4096 * 3072
IMAGE_FEATURES, PSEUDO_IMAGE_FEATURES = "image features", "pseudo image features"
# The browser loads nothing from other servers, even if a library adds links to the page
CONTENT_SECURITY_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:"
)


def words_frame(model, processor, image, features: str, top_k: int = 5) -> str:
    """Return the page of [`visual_token_page`] for one image as an iframe; an empty text without an image."""
    if image is None:
        return ""
    model.config.use_pseudo_image_features = features == PSEUDO_IMAGE_FEATURES
    image = open_image(image, MAX_UPLOAD_PIXELS)
    tokens = read_visual_tokens(model, processor, [image], min(top_k, model.config.visual_vocab_size))
    page = visual_token_page([f"Read as {features}"], [shown_image(processor, image)], tokens)
    return f'<iframe title="words" style="width:100%;height:52em;border:0" srcdoc="{html.escape(page)}"></iframe>'


def answers_so_far(
    scheduler: Scheduler, image, features: str, turns: list[tuple[str, str]], question: str, max_new_tokens: int
) -> Iterator[list[tuple[str, str]]]:
    r"""
    Yield `turns`, pairs of question and answer, with the growing answer to `question`. Closing the iterator stops it.

    Args:
        scheduler ([`Scheduler`]): of the model. It answers several conversations at the same time.
        image: the image of the first turn, or `None`.
        features (`str`): `IMAGE_FEATURES` or `PSEUDO_IMAGE_FEATURES`.
    """
    messages: list[dict] = []
    for earlier, answer in [*turns, (question, None)]:
        images = [open_image(image, MAX_UPLOAD_PIXELS)] if image is not None and not messages else []
        messages += conversation({"images": images, "question": earlier})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    pieces: queue.SimpleQueue = queue.SimpleQueue()
    request = generation_request(scheduler, messages, max_new_tokens, pieces.put)
    request.is_streamed = True
    request.use_pseudo_image_features = features == PSEUDO_IMAGE_FEATURES
    scheduler.submit(request)
    answer, is_finished = "", False
    try:
        while not is_finished:
            piece = pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            answer, is_finished = answer + piece.text, piece.finish_reason is not None
            yield [*turns, (question, answer)]
    finally:
        request.cancel()


def generation_request(scheduler: Scheduler, messages: list[dict], max_new_tokens: int, receive) -> GenerationRequest:
    """Return the greedy request for a conversation whose last message is the user's."""
    sources: dict = {}
    prompt = build_prompt(messages, None, sources)
    token_ids = encode_prompt(scheduler.processor, prompt.messages)
    num_tokens = len(token_ids) + len(prompt.images) * (scheduler.model.config.image_seq_length - 1)
    limit = limit_new_tokens(scheduler.model, num_tokens, max_new_tokens)
    return GenerationRequest(token_ids, prompt.images, sources, num_tokens, limit, receive)


def build_page(model, processor, name: str, max_new_tokens: int = 512):
    """Return the page as `gradio.Blocks`. A new image or another kind of features starts a new conversation."""
    require_integers(max_new_tokens=max_new_tokens)
    import gradio

    scheduler = Scheduler(model, processor)

    def as_chat(turns):
        roles = ("user", "assistant")
        return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]

    def ask(image, features, turns, question):
        if not question.strip():
            return
        try:
            for grown in answers_so_far(scheduler, image, features, turns, question.strip(), max_new_tokens):
                yield grown, as_chat(grown), ""
        except Exception as error:  # shown on the page; the server keeps running
            raise gradio.Error(str(error)) from error

    def begin(image, features):
        try:
            return [], [], scheduler.call(lambda: words_frame(model, processor, image, features))
        except Exception as error:
            raise gradio.Error(str(error)) from error

    # The scheduler answers all users in one batch, so no event waits for another
    shared: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
    with gradio.Blocks(title=f"VT-LMM: {name}", analytics_enabled=False, fill_width=True) as page:
        turns = gradio.State([])
        gradio.Markdown(f"## {name}")
        with gradio.Row():
            with gradio.Column():
                # As a path, because gradio would decode an image of any size
                image = gradio.Image(
                    type="filepath", image_mode=None, label="image", sources=["upload", "clipboard"], height=320
                )
                features = gradio.Radio(
                    [IMAGE_FEATURES, PSEUDO_IMAGE_FEATURES],
                    value=PSEUDO_IMAGE_FEATURES if model.config.use_pseudo_image_features else IMAGE_FEATURES,
                    label="what the decoder reads",
                )
            with gradio.Column():
                chat = gradio.Chatbot(label="conversation", height=320, buttons=["copy"])
                question = gradio.Textbox(label="question", placeholder="What is in the image?", submit_btn=True)
        words = gradio.HTML(label="words of the patches")
        question.submit(ask, [image, features, turns, question], [turns, chat, question], **shared)
        for change in (image.change, features.change):
            change(begin, [image, features], [turns, chat, words], **shared)
        chat.clear(lambda: [], outputs=turns, **shared)
    return page


def launch(page, host: str, port: int, **options):
    """Serve the page. Browsers load resources from this server only."""
    from starlette.middleware import Middleware

    own: dict[str, Any] = {"share": False, "ssr_mode": False, "quiet": True, "footer_links": []}
    own["max_file_size"] = MAX_UPLOAD_BYTES
    own["app_kwargs"] = {"middleware": [Middleware(_PolicyHeader)]}
    return page.launch(server_name=host, server_port=port, **own, **options)


class _PolicyHeader:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", CONTENT_SECURITY_POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)
