# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The documentation: names and links exist, commands are accepted, and snippets run at toy size."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest
import typer
import yaml
from helpers.doc_snippets import PAGES, ROOT, blocks, commands, write_demo_outputs

import vtlmm
from vtlmm.cli.main import build_app, main
from vtlmm.hub import verify


FOLDERS = ("modeling_vtlmm", "train", "hub", "vtlmm/*", "vtlmm/*/*", "tests", "benchmarks")
NAMED = re.compile(r"`(?:[\w/]*/)?(?P<file>\w+\.py):(?P<symbol>[A-Za-z_][\w.]*)")
TEST_FILE = re.compile(r"`(?:tests/)?(test_\w+\.py)`")
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def symbols(path: Path) -> set[str]:
    """Return the functions, classes, `Class.method`s and constants of a file."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def missing_symbols(text: str) -> tuple[int, list[str]]:
    """Return the number of `file.py:symbol` in a text, and the missing ones."""
    files = [path for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}/*.py"))]
    matches = list(NAMED.finditer(text))
    known = {
        name: set().union(*(symbols(path) for path in files if path.name == name))
        for name in {match["file"] for match in matches}
    }
    return len(matches), [match[0][1:] for match in matches if match["symbol"] not in known[match["file"]]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_symbols_files_and_links_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    assert missing_symbols(text)[1] == []
    assert [name for name in TEST_FILE.findall(text) if not (ROOT / "tests" / name).is_file()] == []
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


def test_the_table_of_formats_has_all_examples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import generate_reference
    import test_row_formats as examples

    page = generate_reference.formats_page()
    names = [*examples.ROWS, *(make.__name__.replace("_", " ") for make in examples.SOURCES)]
    assert [name for name in names if f"\n| {name} | `" not in page] == []
    assert page.count("\n| ") == len(names) + 2 and examples.BASE64 not in page


def test_a_missing_symbol_is_found():
    assert missing_symbols((ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8"))[0] > 15
    text = "`stages.py:STAGES` `train/trainer.py:VTLMMTrainer.train` `trainer.py:VTLMMTrainer.nothing` `nowhere.py:x`"
    assert missing_symbols(text) == (4, ["trainer.py:VTLMMTrainer.nothing", "nowhere.py:x"])


def test_the_release_makes_the_links_of_the_readme_absolute(tmp_path):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))
    [step] = [step for step in workflow["jobs"]["build"]["steps"] if "README" in step.get("name", "")]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    repository = {"GITHUB_SERVER_URL": "https://host", "GITHUB_REPOSITORY": "user/name", "GITHUB_REF_NAME": "v1"}
    subprocess.run(["bash", "-ec", step["run"]], cwd=tmp_path, env={**os.environ, **repository}, check=True)
    changed = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert LINK.findall(text) and not LINK.findall(changed)
    assert changed.count("](https://host/user/name/raw/v1/docs/") == text.count("](docs/real_photos.jpg)") == 1
    address = re.compile(r"https://host/user/name/(raw|blob)/v1/")
    assert address.sub("", changed) == text


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


# ---- Commands ----


def check_command(words: list[str]) -> None:
    """Raise an error if `vtlmm` does not accept the options of a command. Nothing is run."""
    command, name, rest = typer.main.get_command(build_app()), "vtlmm", words[1:]
    while hasattr(command, "commands") and rest and rest[0] in command.commands:
        command, name, rest = command.commands[rest[0]], rest[0], rest[1:]
    context = command.make_context(name, list(rest))
    if name == "train" and "--list-settings" not in rest:
        from vtlmm.train.recipe import parse_arguments

        parse_arguments(context.args)


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page.stem}-{number}" for number, (page, _) in enumerate(COMMANDS)]
)
def test_command_of_a_page_is_accepted(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(words)


def test_a_wrong_command_is_found():
    with pytest.raises(Exception, match="--dataste"):
        check_command(["vtlmm", "eval", "model", "--dataste", "rows.json"])
    with pytest.raises(ValueError, match="learning_rat"):
        check_command(["vtlmm", "train", "--learning_rat", "1"])


# These use only files of the demo.
RUN = ("ask", "tokens", "analyze", "verify", "push", "export")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_commands_of_the_readme_run(name, tmp_path, monkeypatch):
    write_demo_outputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    pages = [page for page in PAGES if page.name in ("README.md", "quickstart.md", "serving.md")]
    words = next(words for page in pages for words in commands(page) if words[1] == name and "demo" in words[2])
    if name == "push":  # it loads the same model in a new process as `verify`
        monkeypatch.setattr(verify, "load_in_new_process", lambda *arguments: [])
    assert main(words[1:]) == 0


@pytest.mark.slow
def test_evaluations_of_the_readme_can_be_compared(tmp_path, monkeypatch):
    write_demo_outputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    steps = [words for words in commands(ROOT / "README.md") if words[1] in ("eval", "compare")]
    assert [words[1] for words in steps] == ["eval", "eval", "compare"]
    for words in steps:
        assert main(words[1:]) == 0


# ---- Python ----

SNIPPETS = [(page, code) for page in PAGES for code in blocks(page, "python")]
IDS = [f"{page.stem}-{number}" for number, (page, _) in enumerate(SNIPPETS)]
HUB_IDS = {"facebook/dinov2-small": "mobilenet_v2", "HuggingFaceTB/SmolLM2-135M-Instruct": "stories260k"}


@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=IDS)
def test_snippet_imports_names_that_exist(page, code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "vtlmm":
            assert [alias.name for alias in node.names if not hasattr(vtlmm, alias.name)] == []


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=IDS)
def test_snippet_runs(page, code, tmp_path, monkeypatch, request):
    if "OpenAI(" in code or "xllamacpp" in code:
        pytest.skip("needs a running server; see test_serve.py and test_gguf_llama_cpp.py")
    write_demo_outputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    if any(name in code for name in HUB_IDS):
        shared = request.getfixturevalue("shared")
        for name, folder in HUB_IDS.items():
            code = code.replace(name, str(shared / "weights" / folder))
    (tmp_path / "outputs" / "start").symlink_to(tmp_path / "outputs" / "demo" / "model")
    code = code.replace("num_train_epochs=1", 'max_steps=1, use_cpu=True, report_to="none"')
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def test_the_wheel_has_every_package():
    """pyproject.toml lists the packages by hand. This compares the list with the folders and their data files."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/__init__.py")}
    for pattern in ("*/__init__.py", "inference/*/__init__.py"):
        packages |= {path.parent.relative_to(ROOT) for path in (ROOT / "vtlmm").glob(pattern)}
    packages -= {Path("train"), Path("hub")}  # listed as vtlmm.train and vtlmm.hub
    assert {name.replace(".", "/") for name in settings["packages"]} == set(map(str, packages))
    packed = {path for name, patterns in settings["package-data"].items() for pattern in patterns
              for path in (ROOT / name.replace(".", "/")).glob(pattern)}  # fmt: skip
    folders = [path for path in packages if path not in (Path("vtlmm"), Path("modeling_vtlmm"))]
    others = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert {path for path in others - packed if path.suffix not in (".py", ".pyc")} == set()


def test_quickstart_lists_every_extra():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/quickstart.md").read_text(encoding="utf-8"), re.M)
    assert rows == list(extras)


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/workflows/*.yml")), ids=lambda path: path.name)
def test_workflow_runs_targets_that_exist(path):
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    steps = [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]
    called = {word for step in steps for word in re.findall(r"^make ([\w-]+)", step.get("run", ""), re.M)}
    assert called and called <= targets
