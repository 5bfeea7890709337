# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The result of a data check: problems grouped by kind, with the way to fix each kind."""

import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .arrow_rows import python_values


# Kind of problem: how to fix it
FIXES = {
    "no messages": "give the row a question and an answer, or remove it",
    "roles": "use an optional system message, then user and assistant in turn, with an answer last",
    "text": "write every text as a string",
    "control token": "remove it, or write it in other characters: the model would read it as a command",
    "empty question": "give the question a text or an image, or remove the row",
    "empty answer": "write the answer, or remove the turn: an empty answer trains nothing",
    "image count": "write one <image> mark in a question for every image, and one image for every mark",
    "image in answer": "remove the mark, or move it to a question: the model answers with text only",
    "image path as text": "put the path into a column `image`, or name the column with `columns: {image: NAME}`",
    "missing image": "restore the file, correct its path, or set image_folder to the folder that the paths start from",
    "image path": "write paths inside image_folder, without `..`",
    "broken image": "download the file again, or remove the row",
    "chat template": "change the messages, or the processor's chat_template.jinja",
    "nothing supervised": "write an answer after the context messages (num_context_messages)",
    "too long": "raise max_length, or split the row: rows and images are never truncated",
}

MAX_NAME = 300  # characters of an image path in an error


@dataclass
class Problem:
    """One problem of one row. `value` is the length of a row that is too long."""

    row: int
    kind: str
    detail: str
    image: str | None = None
    value: int | None = None

    @property
    def fix(self) -> str:
        return FIXES[self.kind]

    def __str__(self) -> str:
        image = self.image if self.image is None or len(self.image) <= MAX_NAME else f"{self.image[:MAX_NAME]}…"
        return f"row {self.row}: {self.kind}: {self.detail}{f' ({image})' if image else ''}"


@dataclass
class DataReport:
    r"""
    Result of [`check_rows`].

    Attributes:
        lengths (`list[int]`): tokens of each row with all its image tokens; 0 for a row that cannot be encoded.
        num_supervised_tokens, num_images, num_text_only_rows (`int`)
        problems (`list[Problem]`): in the order of the rows.
        max_length (`int`, *optional*): longest valid row in tokens, at most `max_positions`.
        max_positions (`int`, *optional*): number of positions of the decoder.
        sample (`str`): the first valid row, decoded, with its supervised part between ⟦ and ⟧.
        num_answers, num_unknown_answers (`int`): answers, and answers with a token that the tokenizer does not know.
        unknown_answer (`str`): one of the latter.
    """

    lengths: list[int]
    num_supervised_tokens: int
    num_images: int
    num_text_only_rows: int
    problems: list[Problem]
    max_length: int | None = None
    max_positions: int | None = None
    sample: str = ""
    num_answers: int = 0
    num_unknown_answers: int = 0
    unknown_answer: str = ""

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def good_rows(self) -> list[int]:
        """Return the indices of the rows without a problem."""
        bad = {problem.row for problem in self.problems}
        return [i for i in range(self.num_rows) if i not in bad]

    def length_percentiles(self) -> dict[str, int]:
        """Return the lengths that 50 %, 90 % and 99 % of the rows do not exceed, and the maximum, in tokens."""
        lengths = sorted(length for length in self.lengths if length) or [0]
        percentiles = {f"{p}%": lengths[-(-len(lengths) * p // 100) - 1] for p in (50, 90, 99)}
        return {**percentiles, "max": lengths[-1]}

    def format(self, limit: int = 3) -> str:
        """Return the report as text, with at most `limit` problems of each kind."""
        total = sum(self.lengths)
        share = 100 * self.num_supervised_tokens / max(total, 1)
        tokens = ", ".join(f"{name} {value:,}" for name, value in self.length_percentiles().items())
        limit_text = f" (max_length {self.max_length:,})" if self.max_length else ""
        lines = [
            f"rows        {self.num_rows:,}, {self.num_text_only_rows:,} of them without an image",
            f"images      {self.num_images:,}",
            f"row tokens  {tokens}{limit_text}",
            f"supervised  {self.num_supervised_tokens:,} of {total:,} tokens ({share:.1f} %)",
        ]
        if self.num_unknown_answers:
            lines.append(
                f"unknown     {self.num_unknown_answers:,} of {self.num_answers:,} answers have tokens that the "
                f"tokenizer does not know, such as {self.unknown_answer[:60]!r}: the model cannot write them"
            )
        if self.sample:
            lines += ["one row, its supervised part between ⟦ ⟧:", *(f"  {line}" for line in self.sample.splitlines())]
        return "\n".join(lines + self._problem_lines(limit))

    def _problem_lines(self, limit: int) -> list[str]:
        if not self.problems:
            return ["problems    none"]
        num_bad_rows = len({problem.row for problem in self.problems})
        lines = [f"problems    {len(self.problems):,} in {num_bad_rows:,} of {self.num_rows:,} rows"]
        for kind in dict.fromkeys(problem.kind for problem in self.problems):
            problems = [problem for problem in self.problems if problem.kind == kind]
            lines += [self._group_line(kind, problems), *(f"    {problem}" for problem in problems[:limit])]
            if len(problems) > limit:
                lines.append(f"    … and {len(problems) - limit:,} more")
        return lines

    def _group_line(self, kind: str, problems: list[Problem]) -> str:
        """Return one line for all problems of a kind: how many rows, and how to fix them."""
        rows = len({problem.row for problem in problems})
        count = f"  {rows:,} row{'s' if rows > 1 else ''}"
        lengths = [problem.value for problem in problems if problem.value is not None]
        if kind == "too long" and lengths:
            needed = f"{min(lengths):,} to {max(lengths):,}" if min(lengths) < max(lengths) else f"{max(lengths):,}"
            verb = "need" if rows > 1 else "needs"
            if self.max_positions is not None and max(lengths) > self.max_positions:
                fix = "split the rows or remove them: rows and images are never truncated"
                return f"{count} {verb} {needed} tokens, and the decoder has {self.max_positions:,} positions: {fix}"
            return f"{count} {verb} {needed} tokens. Set max_length={-(-max(lengths) // 64) * 64}: {FIXES[kind]}"
        if kind == "missing image" and self.num_images > 1 and len(problems) == self.num_images:
            folder = os.path.dirname(problems[0].image or "")
            return f"{count}: no image exists ({folder}). Set image_folder to the folder that the paths start from"
        return f"{count}: {kind}: {FIXES[kind]}"

    def raise_for_problems(
        self, limit: int = 3, advice: str = "Set `bad_rows: skip` to train on the other rows."
    ) -> None:
        """
        Raises:
            `ValueError`: with all kinds of problems, and at most `limit` problems of each kind.
        """
        if self.problems:
            raise ValueError("\n".join(["The data have invalid rows.", *self._problem_lines(limit), advice]))


def make_report(results: pa.Table, max_length: int | None, max_positions: int | None) -> DataReport:
    """Return the report of all rows from a table with the columns of `RESULT_FEATURES` of the data check."""
    bad_rows = np.flatnonzero(pc.list_value_length(results["problems"]).to_numpy())
    problems = python_values(results["problems"].take(pa.array(bad_rows)))
    unknown = results["unknown_answer"].filter(pc.not_equal(results["unknown_answer"], ""))
    return DataReport(
        lengths=results["length"].to_numpy().tolist(),
        num_supervised_tokens=pc.sum(results["num_supervised_tokens"]).as_py(),
        num_images=pc.sum(results["num_images"]).as_py(),
        num_text_only_rows=int(np.count_nonzero(results["num_images"].to_numpy() == 0)),
        problems=[
            Problem(i, **problem)
            for i, row_problems in zip(bad_rows.tolist(), problems, strict=True)
            for problem in row_problems
        ],
        max_length=max_length,
        max_positions=max_positions,
        num_answers=pc.sum(results["num_answers"]).as_py(),
        num_unknown_answers=pc.sum(results["num_unknown_answers"]).as_py(),
        unknown_answer=unknown[0].as_py() if len(unknown) else "",
    )
