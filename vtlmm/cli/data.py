# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Check and convert datasets."""

from pathlib import Path
from typing import Annotated, Any

from typer import Exit, Option

from . import options


EXAMPLES = (
    "vtlmm data check --model outputs/start --dataset rows.json --image-folder images",
    "vtlmm data check --config recipes/qlora_24gb.yaml --dataset rows.json",
)


def check(
    config: Annotated[Path | None, Option(help="Recipe in YAML. The other options replace its settings.")] = None,
    dataset: options.Dataset = None,
    model: Annotated[str | None, Option(help="VT-LMM whose processor and chat template are used.")] = None,
    image_folder: options.ImageFolder = None,
    columns: options.Columns = None,
    max_length: Annotated[int | None, Option(min=1, help="Longest row in tokens.")] = None,
) -> None:
    """Check every row and image of the training data. The exit code is 1 if a row has a problem."""
    from vtlmm.data.columns import parse_columns
    from vtlmm.train.dataset_checks import check_data

    settings: dict[str, Any] = {}
    if config:
        from vtlmm.train.recipe import read_recipe  # imports TRL

        settings = read_recipe(config)
    option_values = {
        "dataset_name": dataset,
        "model_name_or_path": model,
        "image_folder": None if image_folder is None else str(image_folder),
        "columns": parse_columns(columns),
        "max_length": max_length,
    }
    settings.update({key: value for key, value in option_values.items() if value is not None})
    num_problems = 0
    for split, report in check_data(settings):
        num_problems += len(report.problems)
        print(f"{split}\n{report.format()}")
    raise Exit(1 if num_problems else 0)
