# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm tokens MODEL IMAGE …` and `vtlmm tokens MODEL --dataset …`"""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from . import options


EXAMPLES = (
    "vtlmm tokens outputs/joint image.jpg",
    "vtlmm tokens outputs/joint --dataset test.parquet --limit 16 --output outputs/tokens",
)


@options.with_loading_options
def tokens(
    model: options.Model,
    images: Annotated[list[Path] | None, Argument(metavar="IMAGE", help="Images.")] = None,
    dataset: options.Dataset = None,
    split: options.Split = "train",
    image_folder: options.ImageFolder = None,
    columns: options.Columns = None,
    limit: Annotated[int, Option(min=1, help="Use the images of the first rows of the dataset.")] = 32,
    output: Annotated[Path | None, Option(help="Folder for the results. Default: one in outputs/tokens.")] = None,
    top_k: Annotated[int, Option(min=1, help="Words per patch.")] = 5,
    overwrite: options.Overwrite = False,
    *,
    loading: options.LoadingOptions,
) -> None:
    """Show the most likely words of every image patch, as PNG, web page and JSON."""
    if bool(images) == bool(dataset):
        raise ValueError("Specify either images or a dataset with --dataset.")

    from vtlmm.analysis.visual_token_files import TOKENS_PAGE, images_of_rows, open_images, save_visual_tokens
    from vtlmm.data.columns import parse_columns

    # The images come first, so that a wrong path is found before the model is loaded.
    if dataset:
        folder_of_images = None if image_folder is None else str(image_folder)
        names, opened = images_of_rows(dataset, folder_of_images, split, limit, parse_columns(columns))
    else:
        names, opened = open_images(images or [])
    loading.require_visual_tokens(model)
    loaded, processor = loading.load(model)
    folder = output or Path("outputs", "tokens", Path(model).name)
    save_visual_tokens(loaded, processor, folder, images=opened, names=names, top_k=top_k, overwrite=overwrite)
    print(f"{len(opened)} images: a PNG each, {TOKENS_PAGE} and JSON in {folder}")
