# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Packing: several rows with their pictures in one sequence, so that nothing is spent on padding.

Positions restart with each row, and transformers' masks keep rows that restart from attending to each other; a row's
first token is never a target. So the loss is that of the unpacked rows (tested).
"""

from bisect import bisect_left, insort

from datasets import Dataset


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

    The column `images` (empty) tells TRL that this is a data set with pictures.
    """
    packs = pack_lengths(list(dataset["length"]), max_length)

    def read(batch: dict) -> dict:
        return {"rows": [[dataset[i] for i in pack] for pack in batch["pack"]], "images": [[] for _ in batch["pack"]]}

    return Dataset.from_dict({"pack": packs}).with_transform(read)
