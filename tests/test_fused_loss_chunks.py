# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The fused losses compute in chunks and blocks, compiled on a GPU."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.fused_losses import (  # noqa: F401 - fixture
    FUNCTIONS,
    HIDDEN_SIZE,
    IMAGE_SIZE,
    LOSSES,
    NUM_ROWS,
    VOCAB_SIZE,
    function_and_inputs,
    relative_error,
    several_blocks_per_chunk,
    value_and_gradients,
)
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_vtlmm import fused_losses_vtlmm as fused
from modeling_vtlmm import losses_vtlmm as plain


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, torch.Tensor):
                self.num_elements = max(self.num_elements, result.numel())
        return results


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(name, monkeypatch):
    monkeypatch.setattr(fused, "ROWS_PER_CHUNK_CPU", 32)
    largest = {}
    for module in (fused, plain):
        with LargestTensor() as mode:
            value_and_gradients(*function_and_inputs(module, name))
        largest[module] = mode.num_elements
    inputs_size = NUM_ROWS * HIDDEN_SIZE
    assert largest[plain] == NUM_ROWS * VOCAB_SIZE > inputs_size
    assert largest[fused] <= max(32 * VOCAB_SIZE, inputs_size)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, None])
def test_compiled_functions_equal_the_blocks(grad_dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 19, VOCAB_SIZE, generator=generator)
    words = torch.randint(VOCAB_SIZE, (19,), generator=generator)
    for definition, in_blocks, target in (
        (fused._divergence, fused._divergence_in_blocks, teacher),
        (fused._cross_entropy, fused._cross_entropy_in_blocks, words),
    ):
        expected_losses, expected_gradient = definition(student, target, grad_dtype)
        losses, gradient = in_blocks(student.clone(), target.clone(), grad_dtype)
        torch.testing.assert_close(losses, expected_losses)
        if grad_dtype is None:
            assert expected_gradient is None
        else:
            torch.testing.assert_close(gradient.to(grad_dtype), expected_gradient)


def test_failed_compilation_warns_once_and_falls_back(monkeypatch):
    def fails(*_):
        raise RuntimeError("no C compiler")

    on_cuda = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(fused, "_compiled", {})
    monkeypatch.setattr(torch, "compile", lambda definition: fails)
    with pytest.warns(UserWarning, match="no C compiler") as caught:
        assert [fused._run("definition", lambda *_: "in blocks", on_cuda) for _ in range(3)] == ["in blocks"] * 3
    assert len(caught) == 1


def test_out_of_memory_error_is_not_a_compile_failure(monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fused, "_compiled", {"definition": fails})
    with pytest.raises(torch.OutOfMemoryError):
        fused._run("definition", lambda *_: "in blocks", SimpleNamespace(is_cuda=True))


@pytest.mark.parametrize("num_rows", [0, 1, 287, 288, 289, 600, 1152])
def test_chunks_are_even_and_cover_every_row(num_rows):
    features = torch.empty(num_rows, 1)
    chunks = [len(features[rows]) for rows in fused._chunks(features)]
    assert sum(chunks) == num_rows and len(chunks) == math.ceil(num_rows / fused.ROWS_PER_CHUNK_CPU)
    assert not chunks or max(chunks) - min(chunks) < len(chunks)
    assert max(chunks, default=0) == fused._logits_tile(features, features).shape[0]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("num_rows", [0, 1, NUM_ROWS])
def test_gradients_do_not_contain_uninitialized_memory(name, num_rows, monkeypatch):
    monkeypatch.setattr(fused, "ROWS_PER_CHUNK_CPU", 16)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(1).isnan()
        found = value_and_gradients(*function_and_inputs(fused, name, num_rows, torch.float32))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("name", LOSSES)
def test_sum_of_many_rows_keeps_float32_precision(name):
    # Added chunk by chunk in float32, a sum of 40,000 losses is off by several units in the last place.
    num_rows, dtype = 40_000, torch.float32
    exact = value_and_gradients(*function_and_inputs(plain, name, num_rows, dtype, exact=True))
    found = value_and_gradients(*function_and_inputs(fused, name, num_rows, dtype))
    assert relative_error(found[0], exact[0]) < torch.finfo(dtype).eps
