# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""`vtlmm merge ADAPTER --output FOLDER`"""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from . import options


EXAMPLES = (
    "vtlmm merge outputs/joint_adapter --output outputs/joint --dtype bfloat16",
    "vtlmm merge outputs/joint_adapter --output outputs/joint --dequantize",
)


def merge(
    adapter: Annotated[Path, Argument(help="Folder that `vtlmm train` wrote with LoRA or DoRA.")],
    output: options.Output,
    base: Annotated[
        str | None, Option(help="Base model: a folder or a Hub id. Default: the model that the adapter names.")
    ] = None,
    dequantize: Annotated[
        bool, Option("--dequantize", help="Merge into the base as nf4 or int8 rounded it in training.")
    ] = False,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Option(help="dtype of the result.")] = "float32",
    overwrite: options.Overwrite = False,
) -> None:
    """Merge an adapter into its base model."""
    from vtlmm.train.merge import merge_adapter

    merge_adapter(adapter, output, base=base, dequantize=dequantize, dtype=dtype, overwrite=overwrite)
