# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm compare RUN RUN`"""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


EXAMPLES = (
    "vtlmm compare outputs/eval/first outputs/eval/second",
    "vtlmm compare outputs/eval/first outputs/eval/second --output outputs/eval/comparison",
)


def compare(
    first: Annotated[Path, Argument(help="Output folder of `vtlmm eval`.")],
    second: Annotated[Path, Argument(help="Output folder of another run on the same questions.")],
    output: Annotated[Path | None, Option(help="Folder for comparison.json.")] = None,
) -> None:
    """Compare two results of `vtlmm eval`, question by question."""
    from vtlmm.evaluation.compare import compare_results

    comparison = compare_results(first, second)
    if output:
        comparison.save(output)
    print(comparison.to_markdown())
    for flip in comparison.flips:
        question = flip.question.partition("\n")[0]
        print(f"{flip.index}: {question} ({flip.truth}): {flip.first!r} → {flip.second!r}")
