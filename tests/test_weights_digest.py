# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The digest of the weights changes with every change of a tensor, and with nothing else."""

import copy

import pytest
import torch
from torch import nn

from vtlmm.hub import weights_digest as module
from vtlmm.hub.weights_digest import weights_digest


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4).to(torch.bfloat16))


def test_equal_weights_have_equal_digests(model, monkeypatch):
    digest = weights_digest(model)
    assert weights_digest(copy.deepcopy(model)) == digest and len(digest) == 16
    model[0].weight.data = model[0].weight.data.T.contiguous().T  # other strides
    assert weights_digest(model) == digest
    monkeypatch.setattr(module, "CHUNK", 5)
    assert weights_digest(model) == digest


CHANGES = {
    "one bit": lambda model: model[2].weight.data.view(torch.int16)[1, 2].bitwise_xor_(1),
    "two rows swapped": lambda model: model[0].weight.data.copy_(model[0].weight.data[[1, 0, 2, 3]]),
    "sign of zero": lambda model: model[0].bias.data.copy_(torch.tensor([-0.0, 0, 0, 0])),
    "a buffer": lambda model: model[1].running_mean.add_(1),
    "dtype": lambda model: model[0].double(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_of_a_tensor_changes_the_digest(model, name):
    model[0].bias.data.zero_()
    before = weights_digest(model)
    CHANGES[name](model)
    assert weights_digest(model) != before
