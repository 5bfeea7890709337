# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Options that several commands share, so that an option has one name and one help text."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, BadParameter, Option


Model = Annotated[str, Argument(help="VT-LMM, exported LLaVA or adapter: a folder or a Hub id.")]
Output = Annotated[Path, Option(help="Folder for the result.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an existing result.")]
Seed = Annotated[int, Option(min=0, help="Random seed.")]

DATASET_HELP = "File (.json, .jsonl, .csv, .parquet), folder or Hub id of a dataset."
Dataset = Annotated[str | None, Option(help=DATASET_HELP)]
RequiredDataset = Annotated[str, Option(help=DATASET_HELP)]
Split = Annotated[str, Option(help="Split of the dataset. A file has one split, train.")]
ImageFolder = Annotated[Path | None, Option(help="Folder of the image paths. Default: the folder of the dataset.")]
Columns = Annotated[
    str | None,
    Option(metavar="NAME=COLUMN,…", help="Names of your columns: image=photo,question=ask. photo= ignores a column."),
]
Limit = Annotated[int | None, Option(min=1, help="Use the first rows only. The result is marked as a subset.")]
BatchSize = Annotated[int, Option(min=1, help="Questions or images per forward pass.")]


def parse_batch_size(value: str) -> int | Literal["auto"]:
    """Return a batch size of the command line."""
    if value == "auto" or (str(value).isdecimal() and int(value) > 0):
        return "auto" if value == "auto" else int(value)
    raise BadParameter(f"{value!r} is neither a whole number of at least 1 nor auto.")


AutoBatchSize = Annotated[
    Any,
    Option(
        parser=parse_batch_size,
        metavar="NUMBER|auto",
        help="Questions per forward pass. auto: 64, or fewer if the memory is too small.",
    ),
]
MaxNewTokens = Annotated[int, Option(min=1, help="Longest answer in tokens.")]

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Dtype = Annotated[DtypeName, Option(help="dtype of the weights. auto: the dtype of the checkpoint.")]
LoadIn4Bit = Annotated[bool, Option("--load-in-4bit", help="Quantize the decoder to nf4 with bitsandbytes.")]
LoadIn8Bit = Annotated[bool, Option("--load-in-8bit", help="Quantize the decoder to int8 with bitsandbytes.")]
DeviceMap = Annotated[
    str | None,
    Option(help="cpu, cuda:1, or auto (all GPUs, then CPU and disk). Default: the first GPU."),
]
PseudoImageFeatures = Annotated[
    bool, Option("--use-pseudo-image-features", help="Give the decoder pseudo image features.")
]
Revision = Annotated[str | None, Option(help="Branch, tag or commit of a Hub id.")]
TrustRemoteCode = Annotated[bool, Option("--trust-remote-code", help="Allow code in the model's folder to run.")]

VMHeadInit = Literal["lm_head", "input_embeddings", "random"]
Host = Annotated[str, Option(help="Address to listen at. The default accepts connections from this machine only.")]
Port = Annotated[int, Option(min=0, max=65535, help="Port to listen at.")]


@dataclass
class LoadingOptions:
    """How a command loads its model. [`with_loading_options`] makes an option of each field."""

    dtype: Dtype = "auto"
    load_in_4bit: LoadIn4Bit = False
    load_in_8bit: LoadIn8Bit = False
    device_map: DeviceMap = None
    use_pseudo_image_features: PseudoImageFeatures = False
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False

    def load(self, name: str) -> Any:
        """Return the model and the processor of a folder or Hub id, see [`load_model`]."""
        from vtlmm.inference.loading import load_model

        return load_model(name, **vars(self))

    def require_visual_tokens(self, name: str) -> None:
        """Raise a `ValueError` for a model without a VM head, before its weights are loaded."""
        from vtlmm.inference.loading import load_config, require_visual_tokens

        require_visual_tokens(load_config(name, self.revision, self.trust_remote_code), name)


def with_loading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameter `loading` of a command by one option for each field of [`LoadingOptions`]."""
    signature = inspect.signature(command)
    names = [field.name for field in fields(LoadingOptions)]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        loading = LoadingOptions(**{name: values.pop(name) for name in names})
        command(**values, loading=loading)

    command_parameters = [parameter for name, parameter in signature.parameters.items() if name != "loading"]
    parameters = [*command_parameters, *inspect.signature(LoadingOptions).parameters.values()]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # typer reads it
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped
