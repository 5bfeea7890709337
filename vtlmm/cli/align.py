# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm align MODEL --dataset … --output …`"""

from pathlib import Path
from typing import Annotated

from typer import Option

from . import options


EXAMPLES = (
    "vtlmm align outputs/start --dataset captions.json --image-folder images --output outputs/aligned",
    "vtlmm align outputs/llava_7b/start --dataset captions.json --keep-projector --output outputs/llava_7b/aligned",
)


def align(
    model: options.Model,
    dataset: options.RequiredDataset,
    output: Annotated[Path | None, Option(help="Folder for the result. Default: change the model's folder.")] = None,
    image_folder: options.ImageFolder = None,
    columns: options.Columns = None,
    keep_projector: Annotated[
        bool, Option("--keep-projector", help="Solve the VM head alone, for a model with a trained projector.")
    ] = False,
    dtype: options.Dtype = "auto",
    overwrite: options.Overwrite = False,
) -> None:
    """Solve the projector and the VM head from captions, without training."""
    from vtlmm.data.columns import parse_columns
    from vtlmm.train.caption_alignment import align_checkpoint

    result = align_checkpoint(
        model,
        dataset,
        output,
        image_folder=image_folder,
        columns=parse_columns(columns),
        keep_projector=keep_projector,
        dtype=dtype,
        overwrite=overwrite,
    )
    print(
        f"Aligned with {result.num_images} captioned images and {result.num_candidates} words: {output or model}\n"
        "Show the words of an image: vtlmm tokens MODEL IMAGE"
    )
