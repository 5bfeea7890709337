# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Read, check and write the tensors of a checkpoint without a model.

Files are mapped into memory, and a tensor is read when its shard is written. A conversion holds one shard in memory.
"""

import json
import logging
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration
from vtlmm.data.json_files import read_json, require_type

from .special_tokens import fit_rows


logger = logging.getLogger(__name__)
MAX_NAMES = 20  # tensors that an error names

# Pairs of prefixes of tensor names: in another format and in ours. The first match is used, in either direction.
Names = tuple[tuple[str, str], ...]
Tensors = dict[str, "StoredTensor | torch.Tensor"]

# Tensors that older libraries saved. They are computed from the config.
DERIVED = re.compile(r"\.(rotary_emb\.inv_freq|position_ids)$")

# Quantization state that bitsandbytes stores with a weight in 4 or 8 bits.
QUANTIZED = re.compile(r"\.weight\.(nested_)?(absmax|quant_map)$|\.weight\.quant_state\.\w+$|\.(SCB|weight_format)$")

INDEX_FILE = "model.safetensors.index.json"
# The files to download from a checkpoint on the Hub.
CHECKPOINT_FILES = ["*.json", "*.jinja", "*.safetensors", "*.bin", "*.model"]
SHARD_SIZE = "2GB"  # the Hub allows 5 GB; smaller shards need less memory in a conversion
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor that was not read from its file yet.

    file (`Path`), key (`str`, its name in the file), meta (`torch.Tensor`: shape and dtype, without values),
    num_rows (`int`, *optional*): number of rows to resize it to when it is read, see [`fit_rows`].
    """

    file: Path
    key: str
    meta: torch.Tensor
    num_rows: int | None = None

    def with_rows(self, num_rows: int) -> "StoredTensor":
        """Return the same tensor with `num_rows` rows, for a vocabulary of another size."""
        return replace(self, meta=self.meta.new_empty(num_rows, *self.meta.shape[1:]), num_rows=num_rows)

    def take_from(self, mapped: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the values from the `mapped` file."""
        tensor = mapped[self.key]
        return tensor.contiguous() if self.num_rows is None else fit_rows(tensor, self.num_rows)


def our_name(name: str, names: Names) -> str:
    """Return the model's name of the tensor `name` in another format. An unknown name is kept."""
    return next((ours + name.removeprefix(theirs) for theirs, ours in names if name.startswith(theirs)), name)


def their_name(name: str, names: Names) -> str:
    """Return the name in another format of the model's tensor `name`."""
    return next((theirs + name.removeprefix(ours) for theirs, ours in names if name.startswith(ours)), name)


def list_tensors(folder: Path, names: Names = ()) -> dict[str, StoredTensor]:
    r"""
    Return all tensors of `folder` by our names, from `.safetensors` files or else from `.bin` files, without their
    values.

    Raises:
        `ValueError`: if such a file is missing, a file is corrupted, or the index names a missing file or tensor.
    """
    tensors = {}
    for file, indexed in _weight_files(folder).items():
        mapped = map_file(file)
        missing = sorted(indexed - mapped.keys())
        if missing:
            raise ValueError(f"{file}: tensors that the index lists are missing: {', '.join(missing)}.")
        for key, tensor in mapped.items():
            if not DERIVED.search(key):
                tensors[our_name(key, names)] = StoredTensor(file, key, torch.empty_like(tensor, device="meta"))
    return tensors


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Return the files with tensors, each with the names that the index lists for it."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file():
            files = defaultdict(set)
            for name, file in read_json(index, entries={"weight_map": dict})["weight_map"].items():
                files[folder / require_type(file, str, f"{index}, {name}")].add(name)
            missing = sorted(file.name for file in files if not file.is_file())
            if missing:
                raise ValueError(f"{index} names missing files: {', '.join(missing)}.")
            return dict(sorted(files.items()))
        if single.is_file():
            return {single: set()}
    raise ValueError(f"{folder} contains no weights: no model.safetensors, pytorch_model.bin or index of shards.")


def map_file(file: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of `file`, mapped into memory, so that only used tensors are read."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # A .bin file is a pickle; with `weights_only` it cannot run code.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{file} cannot be read: it is corrupted or contains objects other than tensors: {error}"
        ) from error


def without_quantization_state(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return `tensors` without the quantization state of bitsandbytes, and 4-bit weights with their original shape."""
    weights = {name: tensor for name, tensor in tensors.items() if not QUANTIZED.search(name)}
    for name in tensors.keys() - weights.keys():
        weight, is_state, _ = name.partition(".quant_state.")
        if is_state and weight in weights:
            with safe_open(tensors[name].file, framework="pt") as file:
                state = json.loads(bytes(file.get_tensor(tensors[name].key).tolist()))
            weights[weight] = replace(weights[weight], meta=torch.empty(state["shape"], device="meta"))
    return weights


def model_without_weights(config: VTLMMConfig) -> VTLMMForConditionalGeneration:
    """Return a model on the meta device: names and shapes without memory for values."""
    with torch.device("meta"):
        return VTLMMForConditionalGeneration(config)


def check_tensors(
    tensors: MutableMapping[str, StoredTensor] | MutableMapping[str, StoredTensor | torch.Tensor],
    model: VTLMMForConditionalGeneration,
    folder: Path,
    names: Names = (),
    may_lack: tuple[str, ...] = (),
) -> None:
    r"""
    Compare the tensors of the checkpoint in `folder` with those of `model`, by their names in a saved folder.

    Args:
        tensors (`dict`): our names to [`StoredTensor`] or `torch.Tensor`. An `lm_head` that is tied to the embeddings
            is removed from it.
        may_lack (`tuple[str, ...]`): prefixes of our names that may be missing.

    Raises:
        `ValueError`: if tensors are missing, unexpected or of another shape; the first are named with their files.
    """
    # For some towers and decoders, transformers saves other names than the modules have. It loads both.
    modules = model.state_dict()
    expected = min(
        (revert_weight_conversion(model, modules), modules), key=lambda one: len(one.keys() ^ tensors.keys())
    )
    if model.config.tie_word_embeddings:
        tensors.pop(LM_HEAD, None)
        expected.pop(LM_HEAD, None)

    def described(wrong: Iterable[str]) -> str:
        stored = sorted((name, tensors.get(name)) for name in wrong)
        shown = [
            f"{tensor.key} ({tensor.file.name})" if isinstance(tensor, StoredTensor) else their_name(name, names)
            for name, tensor in stored[:MAX_NAMES]
        ]
        return ", ".join(shown) + (f" and {len(stored) - MAX_NAMES:,} more" if len(stored) > MAX_NAMES else "")

    problems = {
        f"missing from {', '.join(file.name for file in _weight_files(folder))}": [
            name for name in expected if name not in tensors and not name.startswith(may_lack)
        ],
        "unexpected": [name for name in tensors if name not in expected],
        "of a shape that differs from the config": [
            name for name in tensors if name in expected and shape_of(tensors[name]) != expected[name].shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{what}: {described(wrong)}" for what, wrong in problems.items() if wrong)
        raise ValueError(f"The tensors of the checkpoint {folder} do not fit the model. Tensors {text}.")


def shape_of(tensor: StoredTensor | torch.Tensor) -> torch.Size:
    """Return the shape of a tensor in memory or in a file."""
    return tensor.meta.shape if isinstance(tensor, StoredTensor) else tensor.shape


def embeddings_name(model: VTLMMForConditionalGeneration) -> str:
    """Return the name of the input embedding matrix, which differs between decoders."""
    return cast(dict[str, str], model._tied_weights_keys)[LM_HEAD]


def resize_vocabulary(tensors: dict[str, StoredTensor], model: VTLMMForConditionalGeneration, num_rows: int) -> None:
    """Resize embeddings and `lm_head` in `tensors` to `num_rows` rows, and set the vocabulary size in the config."""
    if num_rows != model.config.text_config.vocab_size:
        for name in {embeddings_name(model), LM_HEAD} & tensors.keys():
            tensors[name] = tensors[name].with_rows(num_rows)
        model.config.text_config.vocab_size = num_rows


def write_tensors(tensors: Mapping[str, StoredTensor | torch.Tensor], output: Path, shard_size: int | str) -> None:
    r"""
    Write `tensors` as safetensors into `output`: one file, or shards with an index.

    Args:
        tensors (`dict`): names to [`StoredTensor`] or `torch.Tensor`.
        shard_size (`int` or `str`): largest size of a shard, unless a single tensor is larger.
    """
    output.mkdir(parents=True, exist_ok=True)
    metas = {name: tensor.meta if isinstance(tensor, StoredTensor) else tensor for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(metas, max_shard_size=shard_size)
    for file_name, shard in split.filename_to_tensors.items():
        save_file(_read({name: tensors[name] for name in shard}), output / file_name, metadata={"format": "pt"})
        logger.info("Wrote %s.", file_name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (output / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _read(tensors: Mapping[str, StoredTensor | torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the values of `tensors`. Each file is mapped once, and unmapped when the result is freed."""
    values: dict[str, torch.Tensor] = {}
    by_file: dict[Path, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if isinstance(tensor, StoredTensor):
            by_file[tensor.file][name] = tensor
        else:
            values[name] = tensor
    for file, stored in by_file.items():
        mapped = map_file(file)
        values.update({name: tensor.take_from(mapped) for name, tensor in stored.items()})
    return values
