# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Usual LLaVA rows take a shorter way, with the results of the way of all rows."""

import random

import pytest
from helpers.mutations import MAX_LENGTH, TURNS, mutate, write_images
from helpers.tiny_models import build_processor

from vtlmm.data.arrow_rows import rows_table
from vtlmm.data.formats import convert_row
from vtlmm.data.row_checker import RESULT_FEATURES, RowChecker
from vtlmm.data.row_tables import RowColumns, llava_row
from vtlmm.data.rows import ROW_FEATURES
from vtlmm.hub.chat_templates import add_images_and_marks, load_template


OPTIONS = {"columns": {}, "keep_columns": (), "require_answers": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


def llava_rows():
    """Return mutated rows in LLaVA's format; many of them are still valid."""
    turns = [TURNS, TURNS[:2], [{"from": "system", "value": "say yes"}, *TURNS]]
    for seed in range(600):
        rng = random.Random(seed)
        row = {"id": rng.choice([seed, f"{seed}", "a.png"]), "image": "good.png", "conversations": rng.choice(turns)}
        for _ in range(rng.choice([0, 1, 1, 2])):
            row = mutate(row, rng)
        yield row


def converted(convert, row):
    try:
        return convert(row)
    except ValueError as error:
        return str(error)


def in_columns(row, folder):
    columns = RowColumns(ROW_FEATURES, "rows", str(folder), OPTIONS)
    columns.add(row, 0)
    return columns.table().to_pylist()


def test_usual_rows_are_converted_like_all_rows(folder):
    def one_by_one(row):
        return rows_table(convert_row(row, 0, "rows", str(folder)), ROW_FEATURES).to_pylist()

    rows = list(llava_rows())
    for row in rows:
        assert converted(lambda row: in_columns(row, folder), row) == converted(one_by_one, row), row
    assert 100 < sum(llava_row(row) is not None for row in rows) < 500


@pytest.mark.parametrize("template", ["tests", "vicuna_v1", "mistral", "decoder"])
def test_tables_have_the_results_of_rows(folder, template):
    processor = build_processor()
    if template == "decoder":
        text = "{% for m in messages %}{{ '[' + m.role + '] ' + m.content | trim + eos_token }}{% endfor %}"
        processor.chat_template = add_images_and_marks(text, processor.tokenizer)
    elif template != "tests":
        processor.chat_template = load_template(template)
    results = [converted(lambda row: in_columns(row, folder), row) for row in llava_rows()]
    table = rows_table([row for result in results if isinstance(result, list) for row in result], ROW_FEATURES)
    checker = RowChecker(processor, MAX_LENGTH)
    expected = checker.check(table.to_pylist())
    assert checker.check_table(table).to_pylist() == rows_table(expected, RESULT_FEATURES).to_pylist()
    assert checker.check_table(table[7:50]).to_pylist() == rows_table(expected[7:50], RESULT_FEATURES).to_pylist()
    plain = checker._check_plain(table)
    assert 100 < len(plain) < len(table) and (checker.texts.num_failures > 0) == (template == "decoder")
