# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The command line: help, names of options, and errors. No model is loaded."""

import contextlib
import importlib
import io
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import vtlmm
from vtlmm.cli.main import GROUPS, build_app, main


COMMANDS = [words for commands in GROUPS.values() for words in commands]
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "gradio", "rich"}


def run(*argv: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(argv))
    return code, out.getvalue(), err.getvalue()


def command_of(words: str):
    command = typer.main.get_command(build_app())
    for word in words.split():
        command = command.commands[word]
    return command


def test_help_lists_the_groups_and_every_command():
    code, text, _ = run("--help")
    assert code == 0
    headings = [line.removesuffix(":") for line in text.splitlines() if line and not line.startswith((" ", "Usage"))]
    assert headings == ["Options", *GROUPS]
    assert all(f"\n  {words.split()[0]} " in text for words in COMMANDS)


def test_version_is_printed():
    assert run("--version") == (0, f"vtlmm {vtlmm.__version__}\n", "")


@pytest.mark.parametrize("words", COMMANDS)
def test_help_of_a_command_has_two_examples(words):
    code, text, _ = run(*words.split(), "--help")
    assert code == 0
    examples = [line for line in text.splitlines() if line.startswith(f"    vtlmm {words}")]
    assert len(examples) == 2
    assert all(option.help for option in command_of(words).params if option.name != "help")


@pytest.mark.parametrize("words", COMMANDS)
def test_options_are_in_kebab_case(words):
    options = [name for option in command_of(words).params for name in option.opts if name.startswith("-")]
    assert all("_" not in name and name.startswith("--") for name in options) or words == "train"


def test_an_option_has_one_meaning_in_all_commands():
    """Options with one name have one help text, except where the command says what it reads or writes."""
    texts: dict[str, set[str]] = {}
    for words in COMMANDS:
        for option in command_of(words).params:
            if option.param_type_name == "option":
                texts.setdefault(option.name, set()).add(option.help)
    own = {"output", "dataset", "dtype", "limit", "seed", "chat_template", "vm_head_init", "revision", "image"}
    own |= {"max_new_tokens", "model", "help", "config", "to", "batch_size"}
    assert {name: text for name, text in texts.items() if len(text) > 1 and name not in own} == {}


@pytest.mark.parametrize(
    "words", ["", "train", *(pytest.param(words, marks=pytest.mark.slow) for words in ("eval", "data check", "push"))]
)
def test_help_imports_no_heavy_package_and_is_fast(words):
    # The import of pydantic takes most of the time of typer's help. It is not ours, and differs between machines.
    code = (
        "import sys, time, typer; from pydantic import TypeAdapter; TypeAdapter(int); "
        "start = time.process_time(); from vtlmm.cli.main import main; "
        f"main([*{words.split()}, '--help']); seconds = time.process_time() - start; "
        f"print(sorted({HEAVY} & set(sys.modules)), seconds, file=sys.stderr)"
    )
    for _ in range(3):  # other processes can make an attempt slow
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        modules, _, last = done.stderr.strip().rpartition(" ")
        assert modules == "[]" and "Usage: vtlmm" in done.stdout
        if float(last) < 0.3:
            return
    pytest.fail(f"{last} s of CPU time")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["ask", "model"], "vtlmm ask: The question is missing."),
        (["ask", "model", "no.png", "what?"], "vtlmm ask: "),
        (["ask", "model", "--dataset", "rows.json"], "vtlmm ask: --dataset needs --output"),
        (["eval", "model"], "vtlmm eval: The questions are missing."),
        (["tokens", "model"], "vtlmm tokens: Specify either images or a dataset"),
        (["data", "check"], "vtlmm data: "),
        (["chat", "model", "--image", "no.png"], "vtlmm chat: "),
    ],
)
def test_an_error_that_the_user_can_fix_is_one_line(argv, text):
    code, out, err = run(*argv)
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith(text)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["eval", "model", "--dataste", "rows.json"], "No such option: --dataste"),
        (["eval", "model", "--dataset", "rows.json", "--max-new-tokens", "0"], "'--max-new-tokens'"),
        (["tokenize"], "No such command 'tokenize'"),
        (["compose", "--vision", "x"], "Missing option '--text'"),
        (["export", "model", "--to", "tflite", "--output", "x"], "'tflite' is not"),
    ],
)
def test_a_wrong_option_is_named_with_exit_code_2(argv, text):
    code, _, err = run(*argv)
    assert code == 2 and text in err


def test_ctrl_c_has_its_own_exit_code(monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("vtlmm.hub.verify"), "verify_checkpoint", stop)
    assert run("verify", "model")[0] == 130


def test_the_text_of_an_interrupt_is_printed(monkeypatch):
    """A training says how to resume it, and ends with 128 plus the number of the signal."""
    stopped = KeyboardInterrupt("Stopped at step 3 of 8.")
    stopped.exit_code = 143

    def stop(*_, **__):
        raise stopped

    monkeypatch.setattr(importlib.import_module("vtlmm.hub.verify"), "verify_checkpoint", stop)
    code, _, error = run("verify", "model")
    assert (code, error) == (143, "vtlmm verify: Stopped at step 3 of 8.\n")


def test_commands_hold_no_library_code():
    """A command is a thin layer over one function of the library."""
    sizes = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in Path("vtlmm/cli").glob("*.py")}
    assert max(sizes.values()) < 200, sizes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a model"], "The questions are missing. Pass --dataset or --tasks"),
        (["no model", "--tasks", "mme", "--seed", "1"], "--seed has no effect with --tasks"),
        (["no model", "--tasks", "mme", "--split", "x", "--scorer", "mme"], "--split, --scorer have no effect"),
    ],
)
def test_options_without_effect_are_refused(capsys, options, message):
    assert main(["eval", *options]) == 1 and message in capsys.readouterr().err
