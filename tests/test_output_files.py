# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Output files: complete or absent, valid JSON, harmless CSV, and Markdown tables."""

import csv
import json
import math

import pytest

from vtlmm.data.environment import commit_of_code, machine, package_versions
from vtlmm.data.markdown import markdown_table
from vtlmm.data.output_files import atomic_path, write_csv, write_json, write_text


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "new" / "results.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_json_has_null_for_nan(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, (1.5, math.inf)], "b": {"c": -math.inf, "d": "NaN"}})
    text = (tmp_path / "a.json").read_text()
    value = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert value == {"a": [None, [1.5, None]], "b": {"c": None, "d": "NaN"}}


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_csv_has_no_formulas(tmp_path, text):
    write_csv(tmp_path / "a.csv", ["kind", "score"], [[text, -0.5], ["plain", None]])
    with open(tmp_path / "a.csv", newline="") as file:
        assert list(csv.reader(file)) == [["kind", "score"], [f"'{text}", "-0.5"], ["plain", ""]]


def test_markdown_cells_stay_in_their_column():
    assert markdown_table(["a", "b"], [["x|y", 1], ["two\nlines", ""]]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        r"| x\|y | 1 |",
        "| two lines |  |",
    ]
    with pytest.raises(ValueError, match="1 cells, but the table has 2 columns"):
        markdown_table(["a", "b"], [["x"]])


def test_environment_is_described():
    assert "cores" in machine() and package_versions(["torch"])["torch"][0].isdigit()
    commit = commit_of_code()
    assert commit is None or len(commit) >= 7
