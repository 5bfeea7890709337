# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Write the reference pages from the code and the tests: Python API, commands, training settings and row formats."""

import contextlib
import inspect
import io
import json
import os
import re
import sys
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import vtlmm
from vtlmm.cli.main import GROUPS, main


SECTION = re.compile(r"(Args|Parameters|Returns|Raises|Example|Examples|Source|Equation):$")


def write_pages(folder: Path) -> None:
    """Write `api.md`, `commands.md`, `settings.md` and `formats.md` into `folder`."""
    folder.mkdir(exist_ok=True)
    pages = {"api": api_page, "commands": commands_page, "settings": settings_page, "formats": formats_page}
    for name, text in ((name, page()) for name, page in pages.items()):
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def api_page() -> str:
    """Return the page of all public names: signature and docstring."""
    parts = ["# Python API", "Import every name from `vtlmm`. `import vtlmm` does not import torch."]
    for name in vtlmm.__all__:
        if name == "__version__":
            continue
        value = getattr(vtlmm, name)
        target = value.__init__ if inspect.isclass(value) else value
        signature = str(inspect.signature(target)).replace("(self, ", "(")
        code = signature if len(signature) < 1500 else "(...)"  # a configuration has about 200 arguments
        parts += [f"## {name}", f"```python\n{name}{code}\n```", docstring_to_markdown(inspect.getdoc(value) or "")]
    return "\n\n".join(parts) + "\n"


def formats_page() -> str:
    """Return the page of all formats of rows and files, from the examples that `tests/test_row_formats.py` loads."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import test_row_formats as examples

    lines = ["# Formats", "", "The tests load each of these examples with its image.", "", "## Rows", ""]
    lines += ["| format | row |", "|---|---|"]
    for name, (row, _) in examples.ROWS.items():
        text = json.dumps(row, ensure_ascii=False).replace(examples.BASE64, f"{examples.BASE64[:12]}…")
        lines.append(f"| {name} | `{text.replace('|', chr(92) + '|')}` |")
    lines += ["", "## Files and folders", "", "| source | files | options |", "|---|---|---|"]
    for make in examples.SOURCES:
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            _, options, _ = make(folder)
            files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            shown = {key: str(value).replace(f"{folder}/", "") for key, value in options.items()}
        cells = ["<br>".join(f"`{file}`" for file in files), ", ".join(f"`{k}: {v}`" for k, v in shown.items())]
        lines.append(f"| {make.__name__.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def docstring_to_markdown(text: str) -> str:
    """Turn the sections of a docstring into headings and its arguments into list items."""
    lines, in_section = [], False
    for line in re.sub(r"\[(`[^`]+`)\]", r"\1", text).splitlines():
        if SECTION.fullmatch(line):
            in_section = True
            lines += ["", f"**{line.removesuffix(':')}**", ""]
        elif in_section and line.startswith("    "):
            lines.append(f"  {line.strip()}" if line.startswith("     ") else f"- {line.strip()}")
        else:
            in_section = in_section and not line
            lines.append(line)
    return "\n".join(lines).strip()


def commands_page() -> str:
    """Return the page of all commands with their help."""
    parts = ["# Commands", "`vtlmm --version` prints the version. Every command has `--help`."]
    for heading, commands in GROUPS.items():
        parts.append(f"## {heading}")
        parts += [f"### vtlmm {words}\n\n```text\n{help_of(words)}\n```" for words in commands]
    return "\n\n".join(parts) + "\n"


def help_of(words: str) -> str:
    """Return the help of the command `words`."""
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([*words.split(), "--help"])
    return out.getvalue().strip()


def settings_page() -> str:
    """Return the page of all settings of `vtlmm train`."""
    from vtlmm.data.markdown import markdown_table
    from vtlmm.train.recipe import settings_table

    parts = ["# Training settings", "Settings of `vtlmm train`: keys of a recipe, or options `--name value`."]
    for group, settings in groupby(settings_table(), key=lambda setting: setting.group):
        rows = [(f"`{s.name}`", f"`{s.type}`", f"`{s.default}`", s.help) for s in settings]
        parts.append(f"\n## {group.capitalize()}\n\n{markdown_table(('setting', 'type', 'default', 'meaning'), rows)}")
    return "\n\n".join(parts) + "\n"
