# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The command `vtlmm`. Each command imports the library inside its function, so that `--help` does not load torch."""

import importlib
import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import vtlmm

from . import (
    ablate,
    align,
    analyze,
    app,
    ask,
    chat,
    compare,
    compose,
    convert,
    data,
    data_convert,
    demo,
    eval,
    export,
    merge,
    push,
    serve,
    tokens,
    train,
    verify,
)


class GroupedHelp(TyperGroup):
    """List the commands under the headings of their groups, in the order of the source."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            heading = str(getattr(command, "rich_help_panel", None) or "Commands")
            groups.setdefault(heading, []).append((name, command.get_short_help_str(90)))
        for heading, rows in groups.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


# Heading -> commands. The function's docstring is the help; the module's EXAMPLES follow it.
GROUPS: dict[str, dict[str, Callable]] = {
    "Make a model": {
        "compose": compose.compose,
        "align": align.align,
        "convert": convert.convert,
        "export": export.export,
        "merge": merge.merge,
    },
    "Train": {
        "data check": data.check,
        "data convert": data_convert.convert,
        "train": train.train,
        "ablate": ablate.ablate,
        "demo": demo.demo,
    },
    "Use": {"ask": ask.ask, "chat": chat.chat, "serve": serve.serve, "app": app.app},
    "Understand": {
        "eval": eval.eval,
        "compare": compare.compare,
        "tokens": tokens.tokens,
        "analyze": analyze.analyze,
    },
    "Publish": {"verify": verify.verify, "push": push.push},
}

INTERRUPTED = 130  # exit code of a command that Ctrl-C stopped


def build_app() -> typer.Typer:
    """Return the typer app with all commands."""
    settings: dict[str, Any] = {"rich_markup_mode": None, "add_completion": False, "pretty_exceptions_enable": False}
    root = typer.Typer(cls=GroupedHelp, no_args_is_help=True, help=vtlmm.__doc__.partition("\n")[0], **settings)
    groups: dict[str, typer.Typer] = {}

    @root.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        pass

    for heading, commands in GROUPS.items():
        for words, function in commands.items():
            parent, _, name = words.rpartition(" ")
            if parent and parent not in groups:
                groups[parent] = typer.Typer(no_args_is_help=True, help=data.__doc__, **settings)
                root.add_typer(groups[parent], name=parent, rich_help_panel=heading)
            module = importlib.import_module(function.__module__)
            (groups[parent] if parent else root).command(
                name,
                rich_help_panel=heading,
                epilog="Examples:\n\n\b\n" + "\n".join(f"  {line}" for line in module.EXAMPLES),
                context_settings=getattr(module, "CONTEXT_SETTINGS", None),
            )(function)
    return root


def print_version(value: bool) -> None:
    if value:
        print(f"vtlmm {vtlmm.__version__}")
        raise typer.Exit()


def main(argv: list[str] | None = None) -> int:
    """
    Run one command and return its exit code.

    An error that the user can fix is one line on stderr and exit code 1. A wrong option is exit code 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    logger = logging.getLogger("vtlmm")
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.StreamHandler(sys.stdout)]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import logs an error on a CPU that it can use
    command = f"vtlmm {argv[0]}" if argv else "vtlmm"
    try:
        code = typer.main.get_command(build_app()).main(argv, prog_name="vtlmm", standalone_mode=True)
    except SystemExit as stopped:
        code = stopped.code
        # typer raises an exit with code 130 from a KeyboardInterrupt, whose text says how to resume a training
        interrupt = getattr(stopped.__context__, "__cause__", None)
        if isinstance(interrupt, KeyboardInterrupt):
            print(f"{command}: {interrupt or 'stopped'}", file=sys.stderr)
            return getattr(interrupt, "exit_code", INTERRUPTED)
    except (ValueError, OSError) as error:
        # The first line of an OSError of the Hub's client says what is wrong; the others are general advice.
        text = str(error) if isinstance(error, ValueError) else (str(error).splitlines() or [type(error).__name__])[0]
        print(f"{command}: {text}", file=sys.stderr)
        return 1
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
