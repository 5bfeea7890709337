# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The public names of `vtlmm`: in the checkout and from the wheel, inside and outside the checkout."""

import ast
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vtlmm


ROOT = Path(__file__).parents[1]
NAMES = sorted(set(vtlmm.__all__) - {"__version__"})


def run_python(code: str, folder: Path, path: Path) -> str:
    """Return stdout of `code` in a new process with the working directory `folder` and `path` on the import path."""
    environment = {**os.environ, "PYTHONPATH": str(path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_public_name_exists_and_has_a_docstring(name):
    value = getattr(vtlmm, name)
    assert value.__name__ == name and value.__doc__ and value.__doc__.strip()
    assert name in dir(vtlmm)


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="'vtlmm' has no attribute 'generates'"):
        _ = vtlmm.generates


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(vtlmm.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported == vtlmm._MODULES and set(vtlmm.__all__) == {*imported, "__version__"}
    assert (Path(vtlmm.__file__).parent / "py.typed").is_file()


def test_no_public_function_has_the_name_of_a_module():
    modules = {path.stem for path in ROOT.glob("vtlmm/*/*.py") if path.parent.name != "cli"}
    modules |= {path.name for path in ROOT.glob("vtlmm/*/")}
    assert modules.isdisjoint(NAMES)


def test_import_is_fast_and_imports_no_torch(tmp_path):
    code = (
        "import sys, time; start = time.process_time(); import vtlmm; print(time.process_time() - start);"
        "print(sorted({'torch', 'transformers', 'datasets', 'modeling_vtlmm'} & set(sys.modules)))"
    )
    for _ in range(3):  # other processes can make an attempt slow
        seconds, modules = run_python(code, tmp_path, ROOT).splitlines()
        assert modules == "[]"
        if float(seconds) < 0.05:
            return
    pytest.fail(f"{seconds} s of CPU time")


def test_version_has_one_place():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["project"]["dynamic"] == ["version"] and "version" not in settings["project"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vtlmm.__version__"}


IMPORT_ALL = f"import vtlmm; print(vtlmm.__file__); [getattr(vtlmm, name) for name in {NAMES}]"
# The checkout comes first on the path of `python -c` when it is the working directory, so remove it there.
FIND_ALL = """
import importlib.util, sys
if "" in sys.path:
    sys.path.remove("")
import vtlmm
print(*(importlib.util.find_spec(name).origin for name in ("vtlmm", *sorted(set(vtlmm._MODULES.values())))))
"""


def assert_modules_are_in(root: Path, folder: Path) -> None:
    """Check where a process with the working directory `folder` finds the modules of the public names."""
    found = [Path(path) for path in run_python(FIND_ALL, folder, root).split()]
    assert found[0] == root / "vtlmm" / "__init__.py" and len(found) == 1 + len(set(vtlmm._MODULES.values()))
    assert all(path.is_relative_to(root) for path in found), found


def test_modules_are_found_outside_the_checkout(tmp_path):
    assert_modules_are_in(ROOT, tmp_path)


@pytest.mark.slow
def test_names_work_from_the_wheel(tmp_path):
    if importlib.util.find_spec("build") is None or importlib.util.find_spec("setuptools") is None:
        pytest.skip("build and setuptools are not installed")
    source = tmp_path / "source"  # a copy, because files of an earlier build in the checkout would go into the wheel
    source.mkdir()
    for name in ("modeling_vtlmm", "vtlmm", "train", "hub"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    assert not any(path.is_symlink() for path in (tmp_path / "site").rglob("*"))
    found = run_python(IMPORT_ALL, tmp_path, tmp_path / "site").strip()
    assert Path(found) == tmp_path / "site" / "vtlmm" / "__init__.py"
    assert_modules_are_in(tmp_path / "site", ROOT)
