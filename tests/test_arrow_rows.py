# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Nested Arrow columns as Python values, and JSON lists that are read in parts."""

import io
import json
import random

import pyarrow as pa
import pytest

from vtlmm.data import sources
from vtlmm.data.arrow_rows import python_rows, python_values


def random_value(rng, depth=0):
    """Return a list of structs of lists, with missing values at each level."""
    if rng.random() < 0.15:
        return None
    if depth == 3:
        return rng.choice(["", "a", "é漢", "x" * 50])
    if depth == 1:
        return {"a": random_value(rng, 2), "n": rng.choice([None, 1, 2]), "b": rng.choice([None, True, False])}
    return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]


@pytest.mark.parametrize("seed", range(5))
def test_values_are_those_of_pyarrow(seed):
    rng = random.Random(seed)
    inner = pa.struct([("a", pa.list_(pa.string())), ("n", pa.int64()), ("b", pa.bool_())])
    values = [random_value(rng) for _ in range(60)]
    array = pa.array(values, type=pa.list_(inner))
    assert array.null_count and python_values(array) == array.to_pylist() == values
    for part in (array[7:31], array[60:], pa.chunked_array([array[:3], array[20:], array[5:5]])):
        assert python_values(part) == part.to_pylist()
    table = pa.table({"x": array, "f": pa.array([0.5] * 60), "e": pa.array([{}] * 60, type=pa.struct([]))})[4:]
    assert python_rows(table) == table.to_pylist()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "text",
    ["[]", " [ ] \n", "[1]", "[12345, 6.5e3,\n-7 , null]", '["a]", "\\"b,", "é"]', '[{"a": [1, {"b": []}]}, [], [2]]'],
)
def test_a_list_in_parts_is_the_whole_list(tmp_path, monkeypatch, size, text):
    monkeypatch.setattr(sources, "CHUNK_SIZE", size)
    assert list(sources._list_items(io.StringIO(text))) == json.loads(text)


@pytest.mark.parametrize("text", ["[1, 2", "[1, ]", "[1 2]", "[1] 2", "[,]", "[1}", "[1] [2]", '["a'])
def test_an_invalid_list_is_one_error(tmp_path, monkeypatch, text):
    monkeypatch.setattr(sources, "CHUNK_SIZE", 2)
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="rows.json is not JSON"):
        list(sources.read_file(str(file), str(tmp_path)))
