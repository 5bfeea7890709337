# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Write tensors and metadata to a GGUF file, one tensor in memory at a time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from vtlmm.data.output_files import atomic_path

from .checkpoint_files import StoredTensor, map_file


FILE_TYPES = ("f32", "f16", "bf16", "q8_0")


@dataclass
class GGUFTensor:
    """
    A tensor to write.

    name (`str`): in the GGUF file. source (`StoredTensor` or `torch.Tensor`): the values.
    change (`Callable`, *optional*): applied to the values before they are written, keeps the shape.
    keep_float32 (`bool`): store in float32 with every file type, for vectors and convolutions.
    """

    name: str
    source: StoredTensor | torch.Tensor
    change: Callable[[torch.Tensor], torch.Tensor] | None = None
    keep_float32: bool = False

    @property
    def shape(self) -> torch.Size:
        """Return the shape."""
        return self.source.meta.shape if isinstance(self.source, StoredTensor) else self.source.shape


def import_gguf() -> Any:
    """
    Return the package `gguf`.

    Raises:
        `ValueError`: if it is not installed, with the command that installs it.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF files need the package gguf: pip install 'vtlmm[gguf]'.") from error
    return gguf


def write_gguf(
    path: Path,
    architecture: str,
    file_type: str,
    add_metadata: Callable[[Any], None],
    tensors: Sequence[GGUFTensor],
) -> None:
    r"""
    Write a GGUF file. `path` exists only when the file is complete.

    Matrices are stored in `file_type`. Vectors, convolutions and norms are stored in float32, as llama.cpp needs them.
    A matrix with rows that q8_0 cannot divide into blocks of 32 is stored in float16.

    Args:
        architecture (`str`): `general.architecture`, such as `"llama"` or `"clip"`.
        file_type (`str`): `"f32"`, `"f16"`, `"bf16"` or `"q8_0"`.
        add_metadata (`Callable`): called with the `gguf.GGUFWriter` to add key-value pairs.

    Raises:
        `ValueError`: if a value is not finite in `file_type`.
    """
    gguf = import_gguf()
    with atomic_path(path) as draft:
        writer = gguf.GGUFWriter(draft, architecture)
        try:
            add_metadata(writer)
            writer.add_file_type(_llama_file_type(gguf, file_type))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            types = [_tensor_type(gguf, tensor, file_type) for tensor in tensors]
            for tensor, kind in zip(tensors, types, strict=True):
                _add_info(gguf, writer, tensor, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            mapped: dict[Path, dict[str, torch.Tensor]] = {}
            bar = tqdm(zip(tensors, types, strict=True), desc=path.name, total=len(tensors), unit="tensor")
            for tensor, kind in bar:
                writer.write_tensor_data(_values(gguf, tensor, kind, mapped))
        finally:
            writer.close()


def _llama_file_type(gguf: Any, file_type: str) -> int:
    return int(gguf.LlamaFileType["ALL_F32" if file_type == "f32" else f"MOSTLY_{file_type.upper()}"])


def _tensor_type(gguf: Any, tensor: GGUFTensor, file_type: str) -> Any:
    """Return the type in which `tensor` is stored."""
    types = gguf.GGMLQuantizationType
    if tensor.keep_float32 or len(tensor.shape) != 2:
        return types.F32
    if file_type == "q8_0" and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[types.Q8_0][0]:
        return types.F16
    return types[file_type.upper()]


def _add_info(gguf: Any, writer: Any, tensor: GGUFTensor, kind: Any) -> None:
    """Add name, shape and type of a tensor whose values are written later."""
    import numpy as np

    types = gguf.GGMLQuantizationType
    if kind in (types.F32, types.F16):
        dtype = np.dtype(np.float32 if kind == types.F32 else np.float16)
        shape: tuple[int, ...] = tuple(tensor.shape)
    else:  # the writer expects the shape in bytes
        dtype, shape = np.dtype(np.uint8), tuple(gguf.quant_shape_to_byte_shape(tensor.shape, kind))
    writer.add_tensor_info(tensor.name, shape, dtype, math.prod(shape) * dtype.itemsize, raw_dtype=kind)


def _values(gguf: Any, tensor: GGUFTensor, kind: Any, mapped: dict[Path, dict[str, torch.Tensor]]) -> Any:
    """Return the values of `tensor` as a NumPy array of the type `kind`. `mapped` caches the mapped files."""
    source = tensor.source
    if isinstance(source, StoredTensor):
        if source.file not in mapped:
            mapped[source.file] = map_file(source.file)
        source = source.take_from(mapped[source.file])
    values = source.float()
    if tensor.change is not None:
        values = tensor.change(values)
    limit = torch.finfo(torch.float16).max if kind == gguf.GGMLQuantizationType.F16 else float("inf")
    if not bool((values.abs() <= limit).all()):
        raise ValueError(
            f"{tensor.name} contains values that {kind.name} cannot represent (NaN, infinity or above {limit:g}). "
            "Choose the file type bf16 or f32, or repair the checkpoint."
        )
    return gguf.quants.quantize(values.contiguous().numpy(), kind)
