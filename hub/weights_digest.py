# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Identify the weights of a model."""

import hashlib
import json

import torch
from accelerate.utils import align_module_device
from torch import nn


INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}  # bytes of a number to a type of its bits
CHUNK = 2**24  # numbers that are converted to int64 at once


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """
    Return a short digest of all tensors of a model, equal on every device.

    Each tensor contributes its name, shape and dtype, and two integer sums modulo 2^64: of its bits, and of its bits
    times their positions. Integer sums do not depend on their order. Of a sharded tensor, the local part counts.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.is_meta:  # an offloaded module has its weights only while it runs
            parent, _, tensor_name = name.rpartition(".")
            with align_module_device(model.get_submodule(parent), torch.device("cpu")):
                tensor = getattr(model.get_submodule(parent), tensor_name).clone()
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        entry = [name, list(tensor.shape), str(tensor.dtype), *_bit_sums(tensor)]
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()[:16]


def _bit_sums(tensor: torch.Tensor) -> list[int]:
    """Return the sum of the bits of all numbers as integers, and the sum weighted by position, modulo 2^64."""
    bits = tensor.detach().contiguous().reshape(-1).view(INTEGERS[tensor.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), CHUNK):
        chunk = bits[start : start + CHUNK].long()
        positions = torch.arange(start + 1, start + 1 + len(chunk), device=bits.device)
        sums += torch.stack([chunk.sum(), (chunk * positions).sum()])
    return sums.tolist()
