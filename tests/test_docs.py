# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What the pages of docs/ name exists: `file.py:symbol` and `test_file.py::test`."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FOLDERS = ("modeling_vtlmm", "train", "hub", "vtlmm/*", "tests", "benchmarks")
# A test without its file belongs to the file named last
NAMED = re.compile(r"`(?:[\w/]*/)?(?P<file>\w+\.py)?(?P<colons>::?)(?P<symbol>[A-Za-z_][\w.]*)")


def symbols(path: Path) -> set[str]:
    """Functions, classes, `Class.method`s and constants."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def missing(text: str) -> tuple[int, list[str]]:
    """How many names a page has, and which of them there are not."""
    files = [path for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}/*.py"))]
    known = {}
    number, lacking, last = 0, [], None
    for match in NAMED.finditer(text):
        last = match["file"] or last
        number += 1
        if last not in known:
            known[last] = set().union(*(symbols(path) for path in files if path.name == last))
        if match["symbol"] not in known[last] or (match["colons"] == "::") != str(last).startswith("test_"):
            lacking.append(f"{last}{match['colons']}{match['symbol']}")
    return number, lacking


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    assert missing(page.read_text(encoding="utf-8"))[1] == []


def test_the_names_are_found_and_a_wrong_one_is_too():
    assert missing((ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8"))[0] > 40
    assert missing((ROOT / "docs" / "traps.md").read_text(encoding="utf-8"))[0] > 20
    names = "`losses_vtlmm.py:visual_loss_sum` `train/trainer.py:VTLMMTrainer.log` `test_docs.py::test_nothing[x]`"
    assert missing(f"{names} `::missing`") == (4, ["test_docs.py::test_nothing"])
    assert missing("`nowhere.py:something`") == (1, ["nowhere.py:something"])


def test_the_wheel_has_every_package():
    """pyproject.toml lists the packages by hand. This compares the list with the folders and their data files."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/__init__.py")}
    packages |= {path.parent.relative_to(ROOT) for path in (ROOT / "vtlmm").glob("*/__init__.py")}
    packages -= {Path("train"), Path("hub")}  # listed as vtlmm.train and vtlmm.hub
    assert {name.replace(".", "/") for name in settings["packages"]} == set(map(str, packages))
    packed = {path for name, patterns in settings["package-data"].items() for pattern in patterns
              for path in (ROOT / name.replace(".", "/")).glob(pattern)}  # fmt: skip
    folders = [path for path in packages if path not in (Path("vtlmm"), Path("modeling_vtlmm"))]
    others = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert {path for path in others - packed if path.suffix not in (".py", ".pyc")} == set()
