# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Check and convert datasets."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Exit, Option

from . import options


EXAMPLES = (
    "vtlmm data check --model outputs/start --dataset rows.json --image-folder images",
    "vtlmm data check --config recipes/qlora_24gb.yaml --dataset rows.json",
    "vtlmm data convert rows.json --image-folder images --to parquet --output outputs/dataset",
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
    import modeling_vtlmm  # noqa: F401 - registers the processor
    from vtlmm.data.columns import parse_columns
    from vtlmm.train.recipe import read_recipe
    from vtlmm.train.run_data import check_data

    settings = read_recipe(config) if config else {}
    given = {
        "dataset_name": dataset,
        "model_name_or_path": model,
        "image_folder": None if image_folder is None else str(image_folder),
        "columns": parse_columns(columns),
        "max_length": max_length,
    }
    settings.update({key: value for key, value in given.items() if value is not None})
    num_problems = 0
    for split, report in check_data(settings):
        num_problems += len(report.problems)
        print(f"{split}\n{report.format()}")
    raise Exit(1 if num_problems else 0)


def convert(
    rows: Annotated[str, Argument(help="File (.json, .jsonl, .csv, .parquet), folder or Hub id of a dataset.")],
    output: Annotated[Path, Option(help="Folder for the dataset.")],
    to: Annotated[Literal["parquet", "webdataset"], Option(help="Format of the files.")] = "parquet",
    image_folder: options.ImageFolder = None,
    columns: options.Columns = None,
    split: options.Split = "train",
) -> None:
    """Write rows with their images as a dataset for the Hub. Its viewer shows the images."""
    from vtlmm.data.columns import parse_columns
    from vtlmm.data.dataset_files import write_dataset
    from vtlmm.data.output_files import require_other_place
    from vtlmm.data.rows import load_rows

    require_other_place(output, dataset=rows)
    loaded = load_rows(rows, image_folder=image_folder, columns=parse_columns(columns), split=split)
    write_dataset(loaded, output, to)
    print(f"{output}\nUpload it: hf upload USER/NAME {output} --repo-type dataset")
