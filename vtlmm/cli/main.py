# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The command `vtlmm`. Each sub-command imports what it needs when it runs: `--help` must not wait for torch."""

import argparse
import logging
import sys

from . import (
    ablate,
    analyze,
    app,
    ask,
    chat,
    compose,
    convert,
    data,
    demo,
    eval,
    merge,
    push,
    serve,
    tokens,
    train,
    verify,
)


COMMANDS = {
    "demo": (demo, "train a tiny VT-LMM through all four stages and show what its patches say"),
    "compose": (compose, "make an untrained VT-LMM from a vision tower and a decoder"),
    "convert": (convert, "make a VT-LMM from a VW-LMM or LLaVA-1.5 checkpoint, or a stock LLaVA from it"),
    "data": (data, "check training data before anything is trained"),
    "train": (train, "train one stage, or several, from a recipe"),
    "ask": (ask, "answer one question on stdout, or the questions of a file into a file"),
    "chat": (chat, "talk with a model about images in the terminal"),
    "serve": (serve, "answer OpenAI's client: chat with images over HTTP"),
    "app": (app, "a page to chat about a image and see what its patches say"),
    "eval": (eval, "answer and score one's own questions, with a blind control"),
    "ablate": (ablate, "train the arms of a grid with several seeds and compare them, seed by seed"),
    "tokens": (tokens, "show the words of every patch of images: PNG, page and JSON"),
    "analyze": (analyze, "measure what the visual tokens of a data set mean"),
    "merge": (merge, "put an adapter into its base: a whole VT-LMM"),
    "verify": (verify, "look at a folder or Hub repository and load it in a process without this package"),
    "push": (push, "verify a folder and push it to the Hub in one commit, with a card that writes itself"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vtlmm", description="VT-LMM: image positions that are supervised too.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + "."))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command. An error that the user can mend is one line on stderr and exit code 1."""
    args = build_parser().parse_args(argv)
    logger = logging.getLogger("vtlmm")  # compose and convert say there what they do
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.StreamHandler(sys.stdout)]
    try:
        return COMMANDS[args.command][0].run(args) or 0
    except (ValueError, OSError) as error:
        # what is not on the Hub or cannot be reached is an OSError, whose first line says so: the rest is advice
        said = error if isinstance(error, ValueError) else (str(error).splitlines() or [type(error).__name__])[0]
        print(f"vtlmm {args.command}: {said}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
