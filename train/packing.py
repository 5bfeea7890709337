# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Packing: several rows with their images in one sequence, without padding.

Positions restart with each row. transformers' attention masks separate rows by these restarts, and the first token of
a row is never supervised. The losses are therefore equal to those of the unpacked rows.
"""

from bisect import bisect_left, insort

import torch
from datasets import Dataset, IterableDataset
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vtlmm.data.validation import check_rows
from vtlmm.data.vision_feature_cache import undecoded


ROW_BY_ROW = "sdpa_row_by_row"
# Other layers, such as convolutions and linear attention, carry a state from row to row of a pack.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

# All layers of a forward pass get the same tensor of positions. `.tolist()` synchronizes with the GPU, so cache it.
_lengths = WeakTensorKeyDictionary()


def row_lengths(position_ids: torch.Tensor) -> list[list[int]]:
    """Return the number of tokens of each row, for each sequence of `position_ids` of shape `(B, S)`."""
    if position_ids not in _lengths:
        starts = [[0, *row[1:].eq(0).nonzero().flatten().add(1).tolist(), len(row)] for row in position_ids]
        _lengths[position_ids] = [[b - a for a, b in zip(row, row[1:], strict=False)] for row in starts]
    return _lengths[position_ids]


def row_by_row_attention(module, query, key, value, attention_mask, position_ids=None, **kwargs):
    """
    Compute SDPA for each row of a pack separately; sequences that are not packed go to SDPA unchanged.

    A mask over the whole pack would cost the square of the pack's length, and rule out the flash kernels.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if position_ids is None:
        raise ValueError(
            f"{type(module).__name__} does not get `position_ids`, which separate packed rows. Set "
            "`attn_implementation: eager`, or remove `packing`."
        )
    outputs = []
    lengths = row_lengths(position_ids)
    for i in range(query.shape[0]):
        row = lengths[i if len(lengths) > 1 else 0]  # one row of positions may serve the whole batch
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
    Return the indices of the rows of each pack, by best-fit decreasing.

    Rows are placed by decreasing length, each in the pack with the least room that fits. Packs are sorted by their
    first row.

    Args:
        lengths (`list[int]`): number of tokens of each row.
        max_length (`int`): maximum tokens of a pack.

    Raises:
        `ValueError`: if a row is longer than `max_length`.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # sorted (tokens left, index of pack)
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[row] > max_length:
            raise ValueError(f"Row {row} has {lengths[row]} tokens, more than `max_length` ({max_length}).")
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
    Return a dataset of packs with the column `rows`. The rows are read with their pack.

    `dataset` needs the column `length`. The empty column `images` marks a vision dataset for TRL.
    """
    packs = pack_lengths(list(dataset["length"]), max_length)

    def read(batch: dict) -> dict:
        return {"rows": [[dataset[i] for i in pack] for pack in batch["pack"]], "images": [[] for _ in batch["pack"]]}

    return Dataset.from_dict({"pack": packs}).with_transform(read)


def prepare_packs(model, args, dataset: Dataset) -> Dataset:
    """
    Return packs of at most `args.max_length` tokens, and set the attention and the sampling of `model` and `args`.

    Args:
        model ([`VTLMMForConditionalGeneration`]): gets [`row_by_row_attention`] if it uses SDPA.
        args ([`VTLMMTrainingConfig`]): grouping by length is removed, because packs have about equal lengths.
        dataset ([`~datasets.Dataset`]): with the column `length`.

    Raises:
        `ValueError`: if the decoder does not separate packed rows.
    """
    others = set(getattr(model.config.text_config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others or getattr(model.model.language_model, "_is_stateful", False):
        raise ValueError(
            f"The decoder has layers with a state ({', '.join(sorted(others)) or 'recurrent'}), which do not separate "
            "packed rows. Remove `packing`, or set `train_sampling_strategy: group_by_length` instead."
        )
    attention = model.config.text_config._attn_implementation or ""
    if attention.startswith("flash") and args.per_device_train_batch_size > 1:
        raise ValueError(
            "Flash attention separates packed rows in a batch of one sequence only. Set "
            "`per_device_train_batch_size: 1` and a larger `max_length`; a pack holds many rows."
        )
    if attention == "sdpa" and getattr(model.config.text_config, "sliding_window", None) is None:
        model.model.language_model.set_attn_implementation(ROW_BY_ROW)
    if args.train_sampling_strategy == "group_by_length":
        args.train_sampling_strategy = "random"
    return pack_dataset(dataset, args.max_length)


def with_lengths(dataset, processor, max_length: int | None):
    """
    Return a dataset, or a `dict` of several, with the column `length` in tokens. A stream is returned unchanged.
    """
    if dataset is None or isinstance(dataset, dict):
        named = (dataset or {}).items()
        return dataset and {name: with_lengths(one, processor, max_length) for name, one in named}
    if isinstance(dataset, IterableDataset) or "length" in dataset.column_names:
        return dataset
    return dataset.add_column("length", check_rows(dataset, processor, max_length, images=False).lengths)


def prepare_batching(model, args, processor, train_dataset, eval_dataset) -> tuple:
    """
    Return both datasets, with undecoded images for a cache, and with lengths or as packs if `args` ask for it.

    Raises:
        `ValueError`: if the lengths of a streamed training dataset would be needed.
    """
    if args.cache_image_features:
        train_dataset, eval_dataset = undecoded(train_dataset), undecoded(eval_dataset)
    group_by_length = args.train_sampling_strategy == "group_by_length"
    if not args.packing and not group_by_length:
        return train_dataset, eval_dataset
    if isinstance(train_dataset, IterableDataset):
        raise ValueError(
            "`packing` and `group_by_length` need the lengths of all rows, which a streamed dataset does not have. "
            "Load `train_dataset` as a whole, or remove the setting."
        )
    train_dataset = with_lengths(train_dataset, processor, args.max_length)
    if args.packing:
        return prepare_packs(model, args, train_dataset), eval_dataset
    return train_dataset, with_lengths(eval_dataset, processor, args.max_length)
