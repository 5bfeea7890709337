# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`--columns` of every command that reads rows."""

import json
import random

import pytest
from helpers.training import write_start
from PIL import Image

from vtlmm.cli.main import main


MAPPING = "image=photo,question=ask,answer=reply"
COLORS = ("red", "blue", "green", "white")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Return a folder with a tiny model and 40 rows whose columns no format has."""
    folder = tmp_path_factory.mktemp("columns")
    write_start(folder)
    rows, rng = [], random.Random(0)
    for number in range(40):
        color = rng.choice(COLORS)
        Image.effect_noise((28, 28), 30 + number).convert("RGB").save(folder / f"{number}.png")
        rows.append({"photo": f"{number}.png", "ask": "what is it ?", "reply": f"a {color} square"})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


COMMANDS = {
    "data check": ["--model", "MODEL"],
    "ask": ["MODEL", "--output", "OUTPUT.jsonl", "--max-new-tokens", "2"],
    "eval": ["MODEL", "--output", "OUTPUT", "--max-new-tokens", "2"],
    "tokens": ["MODEL", "--output", "OUTPUT", "--limit", "1"],
    "analyze": ["MODEL", "--output", "OUTPUT", "--limit", "2", "--questions", "0"],
    "align": ["MODEL", "--output", "OUTPUT"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_columns_of_a_command(work, tmp_path, capsys, name):
    if name == "tokens":
        pytest.importorskip("matplotlib")
    places = {"MODEL": str(work / "start"), "OUTPUT": str(tmp_path / "out")}
    arguments = [word.replace("MODEL", places["MODEL"]).replace("OUTPUT", places["OUTPUT"]) for word in COMMANDS[name]]
    command = [*name.split(), *arguments, "--dataset", str(work / "rows.json")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "match no supported format" in error and f"(`--columns {MAPPING}`)" in error
    assert main([*command, "--columns", MAPPING]) == 0, capsys.readouterr().err


def test_columns_of_compose(capsys):
    command = ["compose", "--vision", "a", "--text", "b", "--output", "c", "--columns", MAPPING]
    assert main(command) == 1
    assert "--columns has no effect without --align-captions" in capsys.readouterr().err
