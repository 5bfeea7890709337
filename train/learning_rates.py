# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Learning rates of single modules."""

import torch
from torch import nn


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: list[tuple[set[nn.Parameter], float | None]]) -> None:
    """
    Move parameters into new parameter groups with the given learning rates. None keeps the group's rate.

    Args:
        optimizer (`torch.optim.Optimizer`): is changed.
        rates (`list`): sets of parameters, and the learning rate of each.
    """
    for parameters, rate in rates:
        for group in list(optimizer.param_groups) if rate is not None else ():
            chosen = [p for p in group["params"] if p in parameters]
            if chosen:
                group["params"] = [p for p in group["params"] if p not in parameters]
                optimizer.add_param_group({**group, "params": chosen, "lr": rate})
