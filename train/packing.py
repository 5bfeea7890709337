# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Packing: several rows with their images in one sequence, so that nothing is spent on padding.

Positions restart with each row, and transformers' masks keep rows that restart from attending to each other; a row's
first token is never a target. So the loss is that of the unpacked rows (tested).
"""

from bisect import bisect_left, insort

import torch
from datasets import Dataset, IterableDataset
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vtlmm.data.validation import check_rows


ROW_BY_ROW = "sdpa_row_by_row"
# Others, as convolutions and linear attention, read on from row to row of a pack
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

# Of the positions of a forward: each layer gets the same tensor, and each look into it would wait for the GPU.
_lengths = WeakTensorKeyDictionary()


def row_lengths(position_ids: torch.Tensor) -> list[list[int]]:
    """Tokens of each row in each sequence of `position_ids` (`(B, S)`); a row starts where the positions do."""
    if position_ids not in _lengths:
        starts = [[0, *row[1:].eq(0).nonzero().flatten().add(1).tolist(), len(row)] for row in position_ids]
        _lengths[position_ids] = [[b - a for a, b in zip(row, row[1:], strict=False)] for row in starts]
    return _lengths[position_ids]


def row_by_row_attention(module, query, key, value, attention_mask, position_ids=None, **kwargs):
    """
    SDPA with each row of a pack by itself: with a mask over the whole pack its cost would grow with the pack's length
    squared, and the flash kernels would be out. What is not packed goes to SDPA as it is.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if position_ids is None:
        raise ValueError(
            f"{type(module).__name__} does not get `position_ids`, which tell packed rows apart: set "
            "`attn_implementation: eager`, or do not pack."
        )
    outputs = []
    lengths = row_lengths(position_ids)
    for i in range(query.shape[0]):
        row = lengths[i if len(lengths) > 1 else 0]  # one for all, where the positions are those of a whole batch
        rows = zip(*(states[i : i + 1].split(row, dim=2) for states in (query, key, value)), strict=True)
        attended = [sdpa_attention_forward(module, *states, None, **kwargs)[0] for states in rows]
        outputs.append(torch.cat(attended, dim=1))
    return torch.cat(outputs), None


def _row_by_row_mask(q_length, kv_length, attention_mask=None, **kwargs):
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(ROW_BY_ROW, row_by_row_attention)
AttentionMaskInterface.register(ROW_BY_ROW, _row_by_row_mask)


def pack_lengths(lengths: list[int], max_length: int) -> list[list[int]]:
    """
    Best-fit decreasing: which rows share a sequence, as indices.

    Every row goes, longest first, where it leaves the least room; in order of first rows, so that a seed's shuffle of
    packs is as good as a shuffle of rows.

    Args:
        lengths (`list[int]`): tokens of each row.
        max_length (`int`): tokens of a pack.

    Raises:
        `ValueError`: for a row that is longer than a pack.
    """
    packs, room = [], []  # room: sorted (tokens left, index of pack)
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[row] > max_length:
            raise ValueError(f"Row {row} has {lengths[row]} tokens, more than a pack (`max_length` {max_length}).")
        place = bisect_left(room, (lengths[row], -1))
        if place == len(room):
            packs.append([])
            left, pack = max_length, len(packs) - 1
        else:
            left, pack = room.pop(place)
        packs[pack].append(row)
        if left > lengths[row]:
            insort(room, (left - lengths[row], pack))
    return sorted(map(sorted, packs))


def pack_dataset(dataset: Dataset, max_length: int) -> Dataset:
    """
    A dataset of packs: `rows`, the rows of one pack, read when the pack is. `dataset` needs a column `length`.

    The column `images` (empty) tells TRL that this is a data set with images.
    """
    packs = pack_lengths(list(dataset["length"]), max_length)

    def read(batch: dict) -> dict:
        return {"rows": [[dataset[i] for i in pack] for pack in batch["pack"]], "images": [[] for _ in batch["pack"]]}

    return Dataset.from_dict({"pack": packs}).with_transform(read)


def prepare_packs(model, args, dataset: Dataset) -> Dataset:
    """
    Packs of up to `args.max_length` tokens of a dataset with the column `length`, and a model and settings that go
    with them: attention row by row, no grouping by length.

    Raises:
        `ValueError`: for a decoder that does not tell packed rows apart.
    """
    others = set(getattr(model.config.text_config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others or getattr(model.model.language_model, "_is_stateful", False):
        raise ValueError(
            f"Layers that carry a state along ({', '.join(sorted(others)) or 'recurrent'}) do not tell packed rows "
            "apart: take `packing` out, or set `train_sampling_strategy: group_by_length`."
        )
    attention = model.config.text_config._attn_implementation or ""
    if attention.startswith("flash") and args.per_device_train_batch_size > 1:
        raise ValueError(
            "Flash attention tells packed rows apart in a batch of one only: set `per_device_train_batch_size: 1` "
            "(a pack holds many rows) and a larger `max_length`."
        )
    if attention == "sdpa" and getattr(model.config.text_config, "sliding_window", None) is None:
        model.model.language_model.set_attn_implementation(ROW_BY_ROW)
    if args.train_sampling_strategy == "group_by_length":
        args.train_sampling_strategy = "random"  # packs are about equally long
    return pack_dataset(dataset, args.max_length)


def with_lengths(dataset, processor, max_length: int | None):
    """
    A dataset, or a `dict` of several, with the column `length` in tokens; checking the data may have made it before.
    A stream stays as it is.
    """
    if dataset is None or isinstance(dataset, dict):
        named = (dataset or {}).items()
        return dataset and {name: with_lengths(one, processor, max_length) for name, one in named}
    if isinstance(dataset, IterableDataset) or "length" in dataset.column_names:
        return dataset
    return dataset.add_column("length", check_rows(dataset, processor, max_length, images=False).lengths)
