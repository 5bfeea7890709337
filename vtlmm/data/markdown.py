# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Write Markdown tables."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """
    Return a Markdown table.

    Args:
        header (sequence of `str`): titles of the columns.
        rows: the cells of each row, as many as the header has. `|` and line breaks in a cell are escaped.

    Raises:
        `ValueError`: if a row has another number of cells.
    """
    lines = [_line(header), _line(["---"] * len(header))]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"A row has {len(row)} cells, but the table has {len(header)} columns: {list(row)}.")
        lines.append(_line(row))
    return "\n".join(lines)


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(_escape(str(cell)) for cell in cells)} |"


def _escape(text: str) -> str:
    return " ".join(text.replace("|", r"\|").splitlines()) if text else text
