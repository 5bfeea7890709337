# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Check the numbers that public functions take."""

import math
from numbers import Real
from operator import index
from typing import Any


def require_integers(minimum: int = 1, **values: Any) -> None:
    """
    Check that each given value is None or an integer of at least `minimum`.

    Raises:
        `ValueError`: naming the argument and its value.
    """
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not _is_integer(value) or value < minimum):
            raise ValueError(f"`{name}` is {value!r}. It must be a whole number of at least {minimum}.")


def require_numbers(minimum: float = 0.0, **values: Any) -> None:
    """
    Check that each given value is None or a finite number of at least `minimum`.

    Raises:
        `ValueError`: naming the argument and its value.
    """
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < minimum:
            raise ValueError(f"`{name}` is {value!r}. It must be a number of at least {minimum:g}.")


def _is_integer(value: Any) -> bool:
    try:
        index(value)
    except TypeError:
        return False
    return True


def require_batch_size(batch_size: Any) -> None:
    """
    Raises:
        `ValueError`: if `batch_size` is neither `"auto"` nor a whole number of at least 1.
    """
    if batch_size != "auto":
        require_integers(batch_size=batch_size)
