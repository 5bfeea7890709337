# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The tables of the grids in the documentation are the tables of the numbers in docs/results.json."""

import json
import re
from pathlib import Path

import pytest

from vtlmm.ablations.ood import OODSummary, format_ood
from vtlmm.ablations.paired_tests import Comparison, describe_seeds, format_table, paired_difference


ROOT = Path(__file__).parents[1]
RESULTS = json.loads((ROOT / "docs" / "results.json").read_text(encoding="utf-8"))
PAGES = {"easy_vqa": "results.md", "vqa_rad": "results.md", "real_photos": "real_photos.md"}
GRIDS = [(dataset, grid) for dataset in PAGES for grid in RESULTS[dataset]["grids"]]


def build_table(grid: dict) -> str:
    """Return the Markdown table of a grid in results.json."""
    if "images" in grid["lines"][0]:
        return format_ood([build_summary(line) for line in grid["lines"]])
    return format_table([build_comparison(line, grid) for line in grid["lines"]], grid["reference"])


def build_comparison(line: dict, grid: dict) -> Comparison:
    values = {(other["metric"], other["arm"]): dict(enumerate(other["values"])) for other in grid["lines"]}
    own = values[line["metric"], line["arm"]]
    comparison = describe_seeds(line["metric"], line["arm"], own)
    if line["arm"] != grid["reference"]:
        comparison.difference = paired_difference(values[line["metric"], grid["reference"]], own)
        comparison.image_interval = tuple(line["image_interval"]) if "image_interval" in line else None
    return comparison


def build_summary(line: dict) -> OODSummary:
    seeds = describe_seeds(line["metric"], line["arm"], dict(enumerate(line["values"])))
    low, high = line.get("interval", (None, None))
    return OODSummary(line["metric"], line["images"], line["arm"], seeds.values, seeds.mean, seeds.sd, low, high, 0)


@pytest.mark.parametrize(("dataset", "grid"), GRIDS)
def test_table_has_the_recorded_numbers(dataset, grid):
    text = (ROOT / "docs" / PAGES[dataset]).read_text(encoding="utf-8")
    assert build_table(RESULTS[dataset]["grids"][grid]) in text


@pytest.mark.parametrize("page", sorted(set(PAGES.values())))
def test_every_table_has_recorded_numbers(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    grids = [(dataset, grid) for dataset, grid in GRIDS if PAGES[dataset] == page]
    tables = re.findall(r"(?m)^\| metric \| arm \|(?:.*\n)+?(?=\n|\Z)", text)
    expected = {build_table(RESULTS[dataset]["grids"][grid]) for dataset, grid in grids}
    assert {table.strip() for table in tables} == expected and len(tables) == len(grids)


def test_commands_in_results_name_existing_grids():
    text = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in set(PAGES.values()))
    names = set(re.findall(r"recipes/ablations/(\w+)\.yaml", text)) | {grid for _, grid in GRIDS}
    assert names <= {path.stem for path in (ROOT / "recipes" / "ablations").glob("[0-9]*.yaml")}
