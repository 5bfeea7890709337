# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Write rows with their images as a dataset for the Hub."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from . import options


EXAMPLES = (
    "vtlmm data convert rows.json --image-folder images --output outputs/dataset",
    "vtlmm data convert rows.json --to webdataset --output outputs/shards",
)


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
