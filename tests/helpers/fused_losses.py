# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Functions of the plain and fused losses with their inputs. Test files import the fixture."""

import pytest
import torch

from modeling_vtlmm import fused_losses_vtlmm as fused


# A CPU makes two chunks of 150 and 149 rows, in blocks of 8 rows. Student and teacher differ in hidden size.
NUM_ROWS, VOCAB_SIZE, IMAGE_SIZE, HIDDEN_SIZE = 299, 61, 12, 20
LOSSES = ("vm_head is student", "lm_head is student", "language")
FUNCTIONS = (*LOSSES, "pseudo image features")


@pytest.fixture(autouse=True)
def several_blocks_per_chunk(monkeypatch):
    monkeypatch.setattr(fused, "LOGITS_PER_BLOCK_AND_THREAD_CPU", 8 * VOCAB_SIZE)


def function_and_inputs(module, name, num_rows=NUM_ROWS, dtype=torch.float64, exact=False, device="cpu"):
    """
    Return a function of `module` (plain or fused) with its constants bound, and the tensors to differentiate.

    With `exact`, the numbers are rounded to `dtype` and converted to float64.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        numbers = torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
        return numbers.double() if exact else numbers

    image = normal(num_rows, IMAGE_SIZE), normal(VOCAB_SIZE, IMAGE_SIZE) / 2
    text = normal(num_rows, HIDDEN_SIZE), normal(VOCAB_SIZE, HIDDEN_SIZE) / 2
    embeddings = normal(VOCAB_SIZE, HIDDEN_SIZE)
    words = torch.randint(VOCAB_SIZE, (num_rows,), generator=generator).to(device)

    prefix = "fused_" if module is fused else ""
    visual_loss_sum, language_loss_sum, pseudo_image_features = (
        getattr(module, prefix + f) for f in ("visual_loss_sum", "language_loss_sum", "pseudo_image_features")
    )
    return {
        "vm_head is student": (lambda features, weight: visual_loss_sum(features, weight, *text), image),
        "lm_head is student": (lambda features, weight: visual_loss_sum(features, weight, *image), text),
        "language": (lambda features, weight: language_loss_sum(features, weight, words), text),
        "pseudo image features": (pseudo_image_features, (*image, embeddings)),
    }[name]


def value_and_gradients(function, inputs, scale=1.0, learn=(True, True, True)):
    leaves = [tensor.detach().clone().requires_grad_(needed) for tensor, needed in zip(inputs, learn, strict=False)]
    value = function(*leaves)
    # Different weights, because a plain sum of the pseudo image features would hide errors in the columns.
    weights = torch.arange(1, value.numel() + 1, device=value.device).view(value.shape) / value.numel()
    (value * weights * scale).sum().backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
