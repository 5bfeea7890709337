# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm chat MODEL [--image …]`"""

from .load import add_model_arguments, load_model


HELP = "/image PATH adds a image to the next question, /words shows what its patches say, /reset, /quit"


def add_arguments(parser):
    parser.add_argument("model", help="VT-LMM or its native twin: folder or Hub id")
    parser.add_argument("--image", nargs="+", default=[], metavar="IMAGE", help="images of the first question")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    add_model_arguments(parser)


def run(args) -> int:
    from vtlmm.data.images import open_image

    try:
        import readline  # noqa: F401 - input() then has a history; not every Python has it
    except ImportError:
        pass
    images = [open_image(path) for path in args.image]
    model, processor = load_model(args)
    print(HELP)
    converse(model, processor, images, args.max_new_tokens)
    return 0


def converse(model, processor, images: list, max_new_tokens: int) -> None:
    """Reads lines until there are no more; what cannot be done is said, and the conversation goes on."""
    from jinja2 import TemplateError

    from vtlmm.data.images import open_image
    from vtlmm.inference.generation import conversation

    messages, waiting, shown = [], list(images), list(images)
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
                print(f"There is no {command}. {HELP}")
            elif line:
                asked = messages + conversation({"images": waiting, "question": line})
                answer = print_answer(model, processor, asked, max_new_tokens)
                messages, waiting = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}], []
        except (ValueError, OSError, TemplateError) as error:
            print(error)
        except KeyboardInterrupt:
            print("\n(stopped; the question is not kept)")


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
    """The likeliest word of each patch of the last image, laid out as the patches are."""
    import shutil

    from vtlmm.analysis.visual_tokens import format_patch_words

    if not images:
        raise ValueError("There is no image yet: /image PATH")
    if model.config.model_type != "vtlmm":
        raise ValueError(f"A {model.config.model_type} has no VM head, and so its patches say nothing.")
    print(format_patch_words(model, processor, images[-1], shutil.get_terminal_size().columns))
