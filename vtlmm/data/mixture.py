# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Mix the rows of several datasets."""

from collections.abc import Sequence
from typing import Any, cast

from datasets import ClassLabel, Dataset, Features, IterableDataset, concatenate_datasets, interleave_datasets


def mix_datasets(
    datasets: Sequence[Dataset] | Sequence[IterableDataset],
    weights: Sequence[float | None] | None = None,
    seed: int = 0,
) -> Dataset | IterableDataset:
    r"""
    Return one dataset with the rows of several datasets. Equal arguments give the same rows in the same order.

    Args:
        datasets: rows of [`load_rows`], either all streamed or none.
        weights (*optional*): share of each dataset in the mix; the sum need not be 1. Each row comes from a dataset
            that is drawn at random. A dataset that ends starts again, until all rows of all datasets were used.
            Without weights each row is used once: streams take turns, other datasets follow each other.
        seed (`int`, *optional*, defaults to 0): seed of the draws.

    Raises:
        `ValueError`: if only some datasets have a weight, or a weight is not positive.
    """
    numbers = [] if weights is None else [weight for weight in weights if weight is not None]
    if numbers and len(numbers) < len(datasets):
        raise ValueError(
            f"Only {len(numbers)} of {len(datasets)} datasets have a `weight`. Give all or none a weight."
        )
    if any(isinstance(w, bool) or not isinstance(w, int | float) or not 0 < w < float("inf") for w in numbers):
        raise ValueError(f"The weights of the datasets are {numbers}. Each `weight` must be a positive number.")
    if len(datasets) == 1:
        return datasets[0]
    parts: Any = list(datasets)
    if numbers:
        probabilities = [weight / sum(numbers) for weight in numbers]
        return interleave_datasets(parts, probabilities, seed=seed, stopping_strategy="all_exhausted")
    if isinstance(datasets[0], IterableDataset):
        return interleave_datasets(parts, stopping_strategy=cast(Any, "all_exhausted_without_replacement"))
    return concatenate_datasets(parts)


def with_mixture_index(dataset: Dataset | IterableDataset, index: int, names: list[str]) -> Dataset | IterableDataset:
    r"""
    Return a dataset with `index` in the column `mixture_index`. The trainer logs the losses of each dataset.

    Args:
        dataset: rows of [`load_rows`], one dataset of a mixture.
        index (`int`): number of this dataset in the mixture.
        names (`list[str]`): names of all datasets of the mixture, as the logs show them.
    """
    feature = ClassLabel(names=names)
    if isinstance(dataset, Dataset):
        return dataset.add_column("mixture_index", cast(Any, [index] * len(dataset)), feature=feature)
    features = Features({**(dataset.features or {}), "mixture_index": feature})
    # `map` must not be the first operation that knows the features, because it would decode the images
    return dataset.decode(False).map(_add_index, batched=True, fn_kwargs={"index": index}).cast(features)


def _add_index(batch: dict, index: int) -> dict:
    return {"mixture_index": [index] * len(next(iter(batch.values())))}


def mixture_names(dataset) -> list[str]:
    """Return the names of the datasets of a mixture that [`with_mixture_index`] made, or an empty list."""
    feature = (getattr(dataset, "features", None) or {}).get("mixture_index")
    return list(feature.names) if isinstance(feature, ClassLabel) else []
