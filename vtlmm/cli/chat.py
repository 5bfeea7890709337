# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm chat MODEL [--image …]`"""

import contextlib
import shutil
from pathlib import Path
from typing import Annotated

from typer import Option

from . import options


EXAMPLES = ("vtlmm chat outputs/joint --image image.jpg", "vtlmm chat user/name --load-in-4bit")

HELP = "/image PATH adds an image to the next question, /words shows the top word of each patch, /reset, /quit"


@options.with_loading_options
def chat(
    model: options.Model,
    image: Annotated[list[Path] | None, Option(help="Image of the first question; repeat it for several.")] = None,
    max_new_tokens: options.MaxNewTokens = 512,
    *,
    loading: options.LoadingOptions,
) -> None:
    """Chat with a model about images in the terminal."""
    from vtlmm.data.images import open_image

    with contextlib.suppress(ImportError):  # not every Python has it
        import readline  # noqa: F401 - gives `input` a history
    images = [open_image(path) for path in image or []]
    loaded, processor = loading.load(model)
    print(HELP)
    converse(loaded, processor, images, max_new_tokens)


def converse(model, processor, images: list, max_new_tokens: int) -> None:
    """Answer the lines of stdin until they end. An error is printed, and the conversation continues."""
    from jinja2 import TemplateError

    from vtlmm.data.images import open_image
    from vtlmm.inference.generation import conversation

    messages: list[dict] = []
    waiting, shown = list(images), list(images)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/reset":
                messages, waiting, shown = [], [], []
            elif command == "/image":
                image = open_image(argument.strip())
                waiting.append(image)
                shown.append(image)
            elif command == "/words":
                print_words(model, processor, shown)
            elif command.startswith("/"):
                print(f"Unknown command {command}. {HELP}")
            elif line:
                asked = messages + conversation({"images": waiting, "question": line})
                answer = print_answer(model, processor, asked, max_new_tokens)
                messages, waiting = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}], []
        except (ValueError, OSError, TemplateError) as error:
            print(error)
        except KeyboardInterrupt:
            print("\n(stopped; the question was removed)")


def print_answer(model, processor, messages: list[dict], max_new_tokens: int) -> str:
    from vtlmm.inference.generation import stream_answer

    answer = ""
    for piece in stream_answer(model, processor, messages, max_new_tokens):
        piece = piece if answer else piece.lstrip()
        print(piece, end="", flush=True)
        answer += piece
    print()
    return answer.strip()


def print_words(model, processor, images: list) -> None:
    """Print the top word of each patch of the last image in the layout of the patches."""
    from vtlmm.analysis.visual_tokens import format_patch_words

    if not images:
        raise ValueError("Add an image first: /image PATH.")
    if model.config.model_type != "vtlmm":
        raise ValueError(f"This model is a {model.config.model_type} without a VM head. Visual tokens need a VT-LMM.")
    print(format_patch_words(model, processor, images[-1], shutil.get_terminal_size().columns))
