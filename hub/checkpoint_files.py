# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint files without a model: which tensors a folder has, whether they fit, and shards written one by one.

Files are mapped into memory and a tensor is read when its shard is written, so that a conversion holds one shard and
never the model.
"""

import json
import logging
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from modeling_vtlmm import VTLMMConfig, VTLMMForConditionalGeneration

from .special_tokens import fit_rows


logger = logging.getLogger(__name__)

# Beginnings of tensor names: another format's and ours. The first that fits counts, in either direction.
Names = tuple[tuple[str, str], ...]

# Older libraries saved these; they follow from the config.
DERIVED = re.compile(r"\.(rotary_emb\.inv_freq|position_ids)$")

# What bitsandbytes stores beside a weight of 4 or of 8 bits, to read it by.
QUANTIZED = re.compile(r"\.weight\.(nested_)?(absmax|quant_map)$|\.weight\.quant_state\.\w+$|\.(SCB|weight_format)$")

INDEX_FILE = "model.safetensors.index.json"
# Downloaded from a checkpoint on the Hub; code and other formats are not.
CHECKPOINT_FILES = ["*.json", "*.jinja", "*.safetensors", "*.bin", "*.model"]
SHARD_SIZE = "2GB"  # on the Hub 5 GB are allowed; a smaller shard also converts where there is little memory
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor that still lies in its file.

    file (`Path`), key (`str`, its name there), meta (`torch.Tensor`: shape and type, without values),
    num_rows (`int`, *optional*): rows to give it when it is read, see [`fit_rows`].
    """

    file: Path
    key: str
    meta: torch.Tensor
    num_rows: int | None = None

    def with_rows(self, num_rows: int) -> "StoredTensor":
        """The same tensor with that many rows, for a vocabulary of another size."""
        return replace(self, meta=self.meta.new_empty(num_rows, *self.meta.shape[1:]), num_rows=num_rows)

    def take_from(self, mapped: dict[str, torch.Tensor]) -> torch.Tensor:
        """The values, out of the `mapped` file."""
        tensor = mapped[self.key]
        return tensor.contiguous() if self.num_rows is None else fit_rows(tensor, self.num_rows)


def our_name(name: str, names: Names) -> str:
    """The model's name of the tensor that another format calls `name`; an unknown name is kept."""
    return next((ours + name.removeprefix(theirs) for theirs, ours in names if name.startswith(theirs)), name)


def their_name(name: str, names: Names) -> str:
    """The inverse of [`our_name`]."""
    return next((theirs + name.removeprefix(ours) for theirs, ours in names if name.startswith(ours)), name)


def list_tensors(folder: Path, names: Names = ()) -> dict[str, StoredTensor]:
    r"""
    All tensors of `folder`, from `.safetensors` files or else from `.bin` files, by our names. Nothing is read.

    Raises:
        `ValueError`: when there is no such file, one is damaged, or the index names a file or a tensor that is not
        there.
    """
    found = {}
    for file, indexed in _weight_files(folder).items():
        mapped = map_file(file)
        absent = sorted(indexed - mapped.keys())
        if absent:
            raise ValueError(f"{file} lacks tensors that its index says it has: {', '.join(absent)}.")
        for key, tensor in mapped.items():
            if not DERIVED.search(key):
                found[our_name(key, names)] = StoredTensor(file, key, torch.empty_like(tensor, device="meta"))
    return found


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """The files with tensors, each with the names that the index says are in it."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file():
            files = defaultdict(set)
            for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                files[folder / file].add(name)
            absent = sorted(file.name for file in files if not file.is_file())
            if absent:
                raise ValueError(f"{index} names files that are not there: {', '.join(absent)}.")
            return dict(sorted(files.items()))
        if single.is_file():
            return {single: set()}
    raise ValueError(f"No weights in {folder}: neither model.safetensors nor pytorch_model.bin, nor an index of them.")


def map_file(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of `file` by their names there, mapped into memory: only those that are used are read."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # A .bin file is a pickle, which could run any code.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{file} cannot be read, it is damaged or no file of tensors alone: {error}") from error


def unpacked(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`tensors` without what bitsandbytes stores beside its weights, and 4-bit weights in the shape that they had."""
    found = {name: tensor for name, tensor in tensors.items() if not QUANTIZED.search(name)}
    for name in tensors.keys() - found.keys():
        weight, is_state, _ = name.partition(".quant_state.")
        if is_state and weight in found:
            with safe_open(tensors[name].file, framework="pt") as file:
                state = json.loads(bytes(file.get_tensor(tensors[name].key).tolist()))
            found[weight] = replace(found[weight], meta=torch.empty(state["shape"], device="meta"))
    return found


def model_without_weights(config: VTLMMConfig) -> VTLMMForConditionalGeneration:
    """The model on the meta device: names, shapes and a place for the generation config, in no memory."""
    with torch.device("meta"):
        return VTLMMForConditionalGeneration(config)


def check_tensors(tensors: dict, model, folder: Path, names: Names = (), may_lack: tuple[str, ...] = ()):
    r"""
    Compare the tensors of the checkpoint in `folder` with those that a folder of `model` has.

    Args:
        tensors (`dict`): our names to [`StoredTensor`] or `torch.Tensor`. An `lm_head` that is the embeddings is
            taken out.
        may_lack (`tuple[str, ...]`): beginnings of our names that may be missing.

    Raises:
        `ValueError`: naming every tensor that is missing, of no use, or of another shape, with its file.
    """
    # The names of a folder: of some towers and decoders transformers saves other ones than the modules have.
    expected = revert_weight_conversion(model, model.state_dict())
    if model.config.tie_word_embeddings:
        for found in (tensors, expected):
            found.pop(LM_HEAD, None)

    def described(wrong: Iterable[str]) -> str:
        stored = {name: tensors.get(name) for name in wrong}
        return ", ".join(
            f"{tensor.key} ({tensor.file.name})" if isinstance(tensor, StoredTensor) else their_name(name, names)
            for name, tensor in sorted(stored.items())
        )

    problems = {
        f"missing from {', '.join(file.name for file in _weight_files(folder))}": [
            name for name in expected if name not in tensors and not name.startswith(may_lack)
        ],
        "without a place in the model": [name for name in tensors if name not in expected],
        "of another shape than the config says": [
            name for name in tensors if name in expected and shape_of(tensors[name]) != expected[name].shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {described(wrong)}" for what, wrong in problems.items() if wrong)
        raise ValueError(f"The checkpoint {folder} does not fit the model. Tensors {found}.")


def shape_of(tensor: StoredTensor | torch.Tensor) -> torch.Size:
    return tensor.meta.shape if isinstance(tensor, StoredTensor) else tensor.shape


def embeddings_name(model: VTLMMForConditionalGeneration) -> str:
    """The name of the input embedding matrix, which differs between decoders."""
    return model._tied_weights_keys[LM_HEAD]


def resize_vocabulary(tensors: dict, model: VTLMMForConditionalGeneration, num_rows: int):
    """Give the embeddings and `lm_head` in `tensors` that many rows, and say so in the model's config."""
    if num_rows != model.config.text_config.vocab_size:
        for name in {embeddings_name(model), LM_HEAD} & tensors.keys():
            tensors[name] = tensors[name].with_rows(num_rows)
        model.config.text_config.vocab_size = num_rows


def write_tensors(tensors: dict, output: Path, shard_size: int | str):
    r"""
    Write `tensors` as safetensors into `output`: one file, or shards with their index.

    Args:
        tensors (`dict`): names to [`StoredTensor`] or `torch.Tensor`.
        shard_size (`int` or `str`): bytes of a shard at most, unless one tensor alone is larger.
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


def _read(tensors: dict) -> dict[str, torch.Tensor]:
    """The values of `tensors`; each file is mapped once, and let go when the result is."""
    values, by_file = {}, defaultdict(dict)
    for name, tensor in tensors.items():
        if isinstance(tensor, StoredTensor):
            by_file[tensor.file][name] = tensor
        else:
            values[name] = tensor
    for file, stored in by_file.items():
        mapped = map_file(file)
        values.update({name: tensor.take_from(mapped) for name, tensor in stored.items()})
    return values
