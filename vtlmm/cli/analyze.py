# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm analyze MODEL --dataset …`"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Option

from . import options


EXAMPLES = (
    "vtlmm analyze outputs/joint --dataset test.parquet",
    "vtlmm analyze outputs/joint --dataset test.parquet --labels objects --previous outputs/visual_head",
)


@options.with_loading_options
def analyze(
    model: options.Model,
    dataset: options.RequiredDataset,
    split: options.Split = "train",
    image_folder: options.ImageFolder = None,
    columns: options.Columns = None,
    labels: Annotated[
        str | None,
        Option(
            metavar="COLUMN",
            help="Column with the content of the image: a text, a list, or a list of {label, bbox}. "
            "Default: the answers.",
        ),
    ] = None,
    limit: options.Limit = None,
    questions: Annotated[int, Option(min=0, help="Number of questions for the failure modes.")] = 200,
    previous: Annotated[
        str | None, Option(metavar="MODEL", help="Model of the previous stage, for stage_instability.")
    ] = None,
    layers: Annotated[bool, Option("--layers", help="Also read every layer of the decoder.")] = False,
    batch_size: options.BatchSize = 4,
    seed: options.Seed = 0,
    output: Annotated[Path | None, Option(help="Folder for the results. Default: one in outputs/analysis.")] = None,
    overwrite: options.Overwrite = False,
    *,
    loading: options.LoadingOptions,
) -> None:
    """Measure what the visual tokens of a dataset mean."""
    from vtlmm.analysis.dataset_analysis import analyze as analyze_dataset
    from vtlmm.data.columns import parse_columns

    mapping = parse_columns(columns)
    loading.require_visual_tokens(model)
    loading_previous = replace(loading, revision=None)  # the revision is of `model`
    if previous:
        loading_previous.require_visual_tokens(previous)
    folder = output or Path("outputs", "analysis", Path(model).name)
    loaded, processor = loading.load(model)
    result = analyze_dataset(
        loaded,
        processor,
        dataset,
        image_folder=None if image_folder is None else str(image_folder),
        split=split,
        columns=mapping,
        labels=labels,
        limit=limit,
        num_questions=questions,
        previous=loading_previous.load(previous) if previous else None,
        layers=layers,
        batch_size=batch_size,
        seed=seed,
        output=folder,
        overwrite=overwrite,
    )
    print(result.summary())
    print(f"Tables and JSON: {folder}")
