# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A web page to chat about an image and to see the words of its patches."""

import html
import queue
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from vtlmm.data.images import image_key, open_image
from vtlmm.data.setting_values import require_integers
from vtlmm.evaluation.questions import image_loader, read_questions
from vtlmm.inference.batch_inputs import limit_new_tokens
from vtlmm.inference.generation import build_prompt, conversation
from vtlmm.inference.prompt_encoding import encode_prompt
from vtlmm.inference.scheduler import GenerationRequest, Scheduler

from .patch_features import shown_image
from .visual_token_page import visual_token_page
from .visual_tokens import read_visual_tokens


MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS = 20_000_000, 4096 * 3072
IMAGE_FEATURES, PSEUDO_IMAGE_FEATURES = "image features", "pseudo image features"
OTHER_IMAGE = "features of another image"
SUBTITLE = "Chat about an image, and see the words that the model predicts for each of its patches."
EXAMPLES = tuple(
    (str(Path(__file__).with_name("example_images") / name), question)
    for name, question in (
        ("cat.jpg", "What animal is in the image?"),
        ("coffee.jpg", "What is in the cup?"),
        ("rocket.jpg", "Describe the image."),
    )
)
NO_IMAGE = (
    '<p style="padding:1em;border-left:4px solid #d97706">No image: answering from text only. '
    "Add an image or choose an example.</p>"
)
ABOUT_COMPARISON = (
    "The *pseudo image feature* of a patch is the mean of the word embeddings, weighted with the patch's word "
    "probabilities. If the answer from pseudo image features is right, the words hold what the question needs. "
    "The features of another image are the control: an answer that stays the same does not come from the image."
)
STYLE = """
.example { justify-content: flex-start; text-align: left; font-weight: normal; }
.example img { width: 2.6rem; height: 2.6rem; object-fit: cover; border-radius: .3rem; margin-right: .6rem; }
"""
# The browser loads nothing from other servers, even if a library adds links to the page
CONTENT_SECURITY_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:"
)


def words_frame(model, processor, image, features: str, top_k: int = 5) -> str:
    """Return the page of [`visual_token_page`] for one image as an iframe, or a note without an image."""
    if image is None:
        return NO_IMAGE
    model.config.use_pseudo_image_features = features == PSEUDO_IMAGE_FEATURES
    image = open_image(image, MAX_UPLOAD_PIXELS)
    tokens = read_visual_tokens(model, processor, [image], min(top_k, model.config.visual_vocab_size))
    page = visual_token_page(["the image"], [shown_image(processor, image)], tokens, embedded=True)
    return f'<iframe title="words" style="width:100%;height:48em;border:0" srcdoc="{html.escape(page)}"></iframe>'


def answers_so_far(
    scheduler: Scheduler, image, features: str, turns: list[tuple[str, str]], question: str, max_new_tokens: int
) -> Generator[list[tuple[str, str]], None, None]:
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


def compare_inputs(
    scheduler: Scheduler, image, other_image, question: str, max_new_tokens: int
) -> Iterator[dict[str, str]]:
    r"""
    Yield the growing answers to one question from three inputs of the decoder: the features of the image, its pseudo
    image features, and the features of another image. The scheduler generates the three answers in one batch.
    """
    inputs = {
        IMAGE_FEATURES: (image, IMAGE_FEATURES),
        PSEUDO_IMAGE_FEATURES: (image, PSEUDO_IMAGE_FEATURES),
        OTHER_IMAGE: (other_image, IMAGE_FEATURES),
    }
    streams = {name: answers_so_far(scheduler, *shown, [], question, max_new_tokens) for name, shown in inputs.items()}
    answers = dict.fromkeys(streams, "")
    yield dict(answers)  # the page shows the inputs before the first token
    try:
        while streams:
            for name, stream in list(streams.items()):
                grown = next(stream, None)
                if grown is None:
                    answers[name] = answers[name] or "(empty answer)"
                    del streams[name]
                else:
                    answers[name] = grown[-1][1]
            yield dict(answers)
    finally:
        for stream in streams.values():
            stream.close()


def comparison_html(question: str, answers: dict[str, str]) -> str:
    """Return the answers of [`compare_inputs`] side by side."""
    cells = "".join(
        f'<div style="flex:1 1 8em;min-width:0"><b>{name}</b><br>{html.escape(answer or "…")}</div>'
        for name, answer in answers.items()
    )
    style = "display:flex;flex-wrap:wrap;gap:1em;overflow-wrap:anywhere"
    return f'<p>{html.escape(question)}</p><div class="comparison" style="{style}">{cells}</div>'


def generation_request(scheduler: Scheduler, messages: list[dict], max_new_tokens: int, receive) -> GenerationRequest:
    """Return the greedy request for a conversation whose last message is the user's."""
    sources: dict = {}
    prompt = build_prompt(messages, None, sources)
    token_ids = encode_prompt(scheduler.processor, prompt.messages)
    num_tokens = len(token_ids) + len(prompt.images) * (scheduler.model.config.image_seq_length - 1)
    limit = limit_new_tokens(scheduler.model, num_tokens, max_new_tokens)
    return GenerationRequest(token_ids, prompt.images, sources, num_tokens, limit, receive)


def examples_of_rows(rows: Dataset, folder: str | Path, number: int = 3) -> list[tuple[str, str]]:
    """
    Write the first `number` different images of a dataset of [`load_rows`] into a folder, and return their paths, each
    with its first question.

    Raises:
        ValueError: If no question is about one image.
    """
    questions, image_positions = read_questions(rows.select(range(min(len(rows), 100 * number))))
    load = image_loader(rows, image_positions)
    first: dict[str, str] = {}
    for question in questions:
        if len(question["images"]) == 1:
            first.setdefault(question["images"][0], question["question"])
    if not first:
        raise ValueError("The first rows of the dataset have no question about one image. Use other rows.")
    examples = []
    for i, (key, text) in enumerate(list(first.items())[:number]):
        path = Path(folder, f"{i}.png")
        load(key).save(path)
        examples.append((str(path), text))
    return examples


def build_page(model, processor, name: str, max_new_tokens: int = 512, examples: Sequence[tuple[str, str]] = EXAMPLES):
    r"""
    Return the page as `gradio.Blocks`. A new image or another kind of features starts a new conversation.

    Args:
        model ([`VTLMMForConditionalGeneration`]), processor ([`VTLMMProcessor`])
        name (`str`): Title of the page.
        examples (sequence of `tuple`, *optional*): Paths of images, with a question for each.
    """
    require_integers(max_new_tokens=max_new_tokens)
    import gradio

    handlers = _Handlers(model, processor, max_new_tokens, examples, gradio.Error)

    # The scheduler answers all users in one batch, so no event waits for another
    shared: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
    with gradio.Blocks(title=f"VT-LMM: {name}", analytics_enabled=False, fill_width=True) as page:
        turns = gradio.State([])
        gradio.Markdown(f"# VT-LMM: {name}\n{SUBTITLE}")
        with gradio.Row():
            # As a path, because gradio would decode an image of any size
            image = gradio.Image(
                type="filepath",
                image_mode=None,
                label="Image",
                sources=["upload", "clipboard"],
                height=190,
                min_width=300,
            )
            with gradio.Column(scale=2, min_width=300):
                gradio.Markdown("Examples: choose an image with its question")
                buttons = [gradio.Button(text, icon=shown, elem_classes="example") for shown, text in examples]
        with gradio.Row():
            with gradio.Column(scale=3, min_width=300):
                words = gradio.HTML(NO_IMAGE, padding=False)
            with gradio.Column(scale=2, min_width=300):
                chat = gradio.Chatbot(label="Conversation", height=420, buttons=["copy"])
                question = gradio.Textbox(label="Question", placeholder="Ask about the image", submit_btn=True)
                features = gradio.Radio(
                    [IMAGE_FEATURES, PSEUDO_IMAGE_FEATURES],
                    value=PSEUDO_IMAGE_FEATURES if model.config.use_pseudo_image_features else IMAGE_FEATURES,
                    label="What the decoder reads",
                    info="Pseudo image features are built from the words of the patches alone.",
                )
                with gradio.Accordion("Compare what the decoder reads", open=False):
                    gradio.Markdown(ABOUT_COMPARISON)
                    compare = gradio.Button("Answer the question from each input")
                    comparison = gradio.HTML()
        question.submit(handlers.ask, [image, features, turns, question], [turns, chat, question], **shared)
        for change in (image.change, features.change):
            change(handlers.begin, [image, features], [turns, chat, words], **shared)
        compare.click(handlers.compare, [image, turns, question], comparison, **shared)
        for button, (shown, text) in zip(buttons, examples, strict=True):
            # An opened image, because gradio would not serve a path of the package
            button.click(partial(_example, shown, text), outputs=[image, question], **shared)
        chat.clear(lambda: [], outputs=turns, **shared)
    return page


class _Handlers:
    """The events of the page. Errors are shown on the page; the server keeps running."""

    def __init__(self, model, processor, max_new_tokens: int, examples, page_error: Callable[[str], Exception]):
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.examples, self.page_error = examples, page_error
        self.scheduler = Scheduler(model, processor)

    def ask(self, image, features, turns, question):
        if not question.strip():
            return
        try:
            for grown in answers_so_far(self.scheduler, image, features, turns, question.strip(), self.max_new_tokens):
                yield grown, _as_chat(grown), ""
        except Exception as error:
            raise self.page_error(str(error)) from error

    def begin(self, image, features):
        try:
            frame = self.scheduler.call(lambda: words_frame(self.model, self.processor, image, features))
            return [], [], frame
        except Exception as error:
            raise self.page_error(str(error)) from error

    def compare(self, image, turns, question):
        """Answer the question in the text box, or the last question of the conversation."""
        question = question.strip() or (turns[-1][0] if turns else "")
        if image is None or not question:
            raise self.page_error("Add an image and write a question first.")
        try:
            key = image_key(open_image(image, MAX_UPLOAD_PIXELS))
            opened = (open_image(example) for example, _ in (*self.examples, *EXAMPLES))
            other = next(example for example in opened if image_key(example) != key)
            for answers in compare_inputs(self.scheduler, image, other, question, self.max_new_tokens):
                yield comparison_html(question, answers)
        except Exception as error:
            raise self.page_error(str(error)) from error


def _example(shown: str, text: str):
    return open_image(shown), text


def _as_chat(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def launch(page, host: str, port: int, **options):
    """Serve the page. Browsers load resources from this server only."""
    from starlette.middleware import Middleware

    settings: dict[str, Any] = {
        "share": False,
        "ssr_mode": False,
        "quiet": True,
        "footer_links": [],
        "theme": _theme(),
        "css": STYLE,
        "max_file_size": MAX_UPLOAD_BYTES,
        "app_kwargs": {"middleware": [Middleware(_PolicyHeader)]},
    }
    return page.launch(server_name=host, server_port=port, **settings, **options)


def _theme():
    """Return gradio's theme with fonts of the browser and with small text dark enough to read."""
    import gradio

    light = "*neutral_600"
    dark = "*neutral_300"
    names = ("body_text_color_subdued", "block_info_text_color", "block_label_text_color", "input_placeholder_color")
    colors = dict.fromkeys(names, light) | {f"{name}_dark": dark for name in names}
    fonts = ("system-ui", "sans-serif")
    return gradio.themes.Default(font=fonts, font_mono=("ui-monospace", "monospace")).set(**colors)


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
