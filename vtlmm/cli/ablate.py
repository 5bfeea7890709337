# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm ablate grid.yaml --output … [key=value …]`"""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from . import options


EXAMPLES = (
    "vtlmm ablate recipes/ablations/3_pseudo.yaml model_name_or_path=outputs/start dataset_name=train.parquet "
    "evaluate.dataset=test.parquet --output outputs/ablations",
    "vtlmm ablate grid.yaml --output outputs/ablations --seed 0 --seed 1",
)


def ablate(
    grid: Annotated[Path, Argument(help="Grid in YAML. See recipes/ablations/.")],
    output: options.Output,
    settings: Annotated[
        list[str] | None, Argument(metavar="KEY=VALUE", help="Settings that replace the grid's in all arms.")
    ] = None,
    seed: Annotated[list[int] | None, Option(min=0, help="Seed of a run; repeat it. Default: the grid's.")] = None,
    only: Annotated[list[str] | None, Option(metavar="ARM", help="Run this arm only; repeat it for several.")] = None,
) -> None:
    """Train the arms of a grid with several seeds and compare them, seed by seed."""
    from vtlmm.ablations.run import run_grid

    print(run_grid(grid, output, settings or [], seed or None, only or None))
