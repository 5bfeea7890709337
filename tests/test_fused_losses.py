"""The fused losses have the values and gradients of the plain ones, and the properties in their docstrings."""

import math

import pytest
import torch
from helpers.fused_losses import (  # noqa: F401 - fixture
    FUNCTIONS,
    HIDDEN_SIZE,
    LOSSES,
    NUM_ROWS,
    VOCAB_SIZE,
    function_and_inputs,
    relative_error,
    several_blocks_per_chunk,
    value_and_gradients,
)
from torch.utils.checkpoint import checkpoint

from modeling_vtlmm import fused_losses_vtlmm as fused
from modeling_vtlmm import losses_vtlmm as plain


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_value_and_gradients_match_float64_autograd(name, dtype, tolerance):
    expected = value_and_gradients(*function_and_inputs(plain, name, dtype=dtype, exact=True), scale=0.37)
    found = value_and_gradients(*function_and_inputs(fused, name, dtype=dtype), scale=0.37)
    for found_tensor, expected_tensor in zip(found, expected, strict=True):
        assert found_tensor.dtype == dtype
        assert relative_error(found_tensor, expected_tensor) < tolerance


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bfloat16_is_no_worse_than_plain_autograd(name):
    exact, by_autograd, found = (
        value_and_gradients(*function_and_inputs(*arguments))
        for arguments in (
            (plain, name, NUM_ROWS, torch.bfloat16, True),
            (plain, name, NUM_ROWS, torch.bfloat16),
            (fused, name, NUM_ROWS, torch.bfloat16),
        )
    )
    for found_tensor, autograd_tensor, exact_tensor in zip(found, by_autograd, exact, strict=True):
        assert found_tensor.dtype == autograd_tensor.dtype
        assert relative_error(found_tensor, exact_tensor) < 1.1 * relative_error(autograd_tensor, exact_tensor) + 1e-6


def test_two_words_by_hand():
    def leaf(*rows):
        return torch.tensor(rows, dtype=torch.float64, requires_grad=True)

    # Student (3/4, 1/4), teacher (1/2, 1/2): KL = ½ ln(2/3) + ½ ln 2, and G = (1/4, −1/4).
    features, weight, flat = leaf([1.0]), leaf([math.log(3)], [0.0]), torch.zeros(2, 1, dtype=torch.float64)
    loss = fused.fused_visual_loss_sum(features, weight, torch.ones(1, 1, dtype=torch.float64), flat)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * math.log(4 / 3))
    assert weight.grad.flatten().tolist() == pytest.approx([0.25, -0.25])
    assert features.grad.item() == pytest.approx(0.25 * math.log(3))

    # The target is the second word: −ln(1/4), and G = (3/4, −3/4).
    features, weight = leaf([1.0]), leaf([math.log(3)], [0.0])
    loss = fused.fused_language_loss_sum(features, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4))
    assert weight.grad.flatten().tolist() == pytest.approx([0.75, -0.75])

    # ¾·4 + ¼·8 = 5. The gradient at the logits is p·(E − 5) = (−3/4, 3/4).
    features, weight, embeddings = leaf([1.0]), leaf([math.log(3)], [0.0]), leaf([4.0], [8.0])
    pseudo = fused.fused_pseudo_image_features(features, weight, embeddings)
    pseudo.sum().backward()
    assert pseudo.item() == pytest.approx(5)
    assert weight.grad.flatten().tolist() == pytest.approx([-0.75, 0.75])
    assert embeddings.grad.flatten().tolist() == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize(
    ("name", "learner"), [*((name, i) for name in FUNCTIONS for i in (0, 1)), ("pseudo image features", 2)]
)
def test_only_required_gradients_are_computed(name, learner):
    function, inputs = function_and_inputs(fused, name)
    learn = [i == learner for i in range(len(inputs))]
    expected = value_and_gradients(*function_and_inputs(plain, name), learn=learn)
    found = value_and_gradients(function, inputs, learn=learn)
    assert [tensor is not None for tensor in found] == [True, *learn]
    assert relative_error(found[1 + learner], expected[1 + learner]) < 1e-9


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_rows_give_zero_with_a_graph(name):
    function, inputs = function_and_inputs(fused, name, num_rows=0)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    assert value.requires_grad and value.sum().item() == 0
    value.sum().mul(0.5).backward()
    assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves)


def test_teacher_gets_no_gradient_with_tied_heads():
    _, (features, weight) = function_and_inputs(fused, "vm_head is student")
    teacher_features = features.flip(0).requires_grad_()
    expected = value_and_gradients(
        lambda x, w: plain.visual_loss_sum(x, w, teacher_features.detach(), w.detach()), (features, weight)
    )
    found = value_and_gradients(
        lambda x, w: fused.fused_visual_loss_sum(x, w, teacher_features, w), (features, weight)
    )
    assert teacher_features.grad is None
    for found_tensor, expected_tensor in zip(found, expected, strict=True):
        assert relative_error(found_tensor, expected_tensor) < 1e-9


def test_gradient_of_a_weight_slice_stays_in_its_rows():
    function, (features, weight) = function_and_inputs(fused, "lm_head is student")
    wider = torch.cat((weight, torch.ones(5, HIDDEN_SIZE, dtype=weight.dtype)))
    _, expected = value_and_gradients(lambda w: function(features, w), (weight,))
    _, found = value_and_gradients(lambda w: function(features, w[:VOCAB_SIZE]), (wider,))
    assert relative_error(found[:VOCAB_SIZE], expected) < 1e-12 and not found[VOCAB_SIZE:].any()


def test_sides_can_differ_in_dtype():
    _, (image_features, vm_weight) = function_and_inputs(fused, "vm_head is student", dtype=torch.bfloat16)
    _, student = function_and_inputs(fused, "lm_head is student", dtype=torch.float32)
    teacher_logits = (image_features @ vm_weight.t()).double()
    expected = value_and_gradients(
        lambda x, w: plain.visual_loss_sum(x, w, teacher_logits, torch.eye(VOCAB_SIZE, dtype=torch.float64)),
        [tensor.double() for tensor in student],
    )
    found = value_and_gradients(lambda x, w: fused.fused_visual_loss_sum(x, w, image_features, vm_weight), student)
    for found_tensor, expected_tensor in zip(found, expected, strict=True):
        assert found_tensor.dtype == torch.float32
        assert relative_error(found_tensor, expected_tensor) < 1e-5


def test_sides_of_different_size_are_rejected():
    function, (features, weight) = function_and_inputs(fused, "lm_head is student")
    with pytest.raises(ValueError, match=r"\(298, 61\).*\(299, 61\)"):
        function(features[1:], weight)
    with pytest.raises(ValueError, match=r"\(299, 60\).*\(299, 61\)"):
        function(features, weight[1:])


@pytest.mark.parametrize("name", LOSSES)
def test_loss_can_be_scaled_by_tensors(name):
    def weighted(module):
        function, (features, weight) = function_and_inputs(module, name)
        factor = torch.tensor(-2.5, dtype=torch.float64)
        return value_and_gradients(
            lambda x, w, f: function(x, w) * f / torch.tensor(NUM_ROWS) + w.sum(), (features, weight, factor)
        )

    for found, expected in zip(weighted(fused), weighted(plain), strict=True):
        assert relative_error(found, expected) < 1e-9


def test_float16_gradient_is_scaled_before_rounding():
    # Σ_n G_n x_n is 4096 · ½ · 60 = 122880, which float16 cannot represent. The mean is 30.
    features, weight = torch.full((4096, 1), 60.0).half(), torch.zeros(2, 1).half().requires_grad_()
    loss = fused.fused_language_loss_sum(features, weight, torch.zeros(4096, dtype=torch.long)) / 4096
    loss.backward()
    assert weight.grad.flatten().tolist() == [-30, 30]


@pytest.mark.parametrize("name", LOSSES)
def test_no_grad_computes_no_gradient(name, monkeypatch):
    function, inputs = function_and_inputs(fused, name)
    expected = function_and_inputs(plain, name)[0](*inputs)
    asked = []
    run = fused._run
    monkeypatch.setattr(fused, "_run", lambda *arguments: asked.append(arguments[-1]) or run(*arguments))
    monkeypatch.setattr(fused, "_add_product", lambda *_: pytest.fail("computed a weight gradient"))
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.no_grad():
        loss = function(*leaves)
    assert set(asked) == {None} and not loss.requires_grad
    assert relative_error(loss, expected) < 1e-9


@pytest.mark.parametrize("name", LOSSES)
def test_second_backward_raises(name):
    function, inputs = function_and_inputs(fused, name)
    loss = function(*(tensor.clone().requires_grad_() for tensor in inputs))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time through a fused loss"):
        loss.backward()


def test_pseudo_image_features_can_be_differentiated_again():
    function, inputs = function_and_inputs(fused, "pseudo image features")
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    value = function(*leaves).sum()
    first, second = (torch.autograd.grad(value, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast(name):
    def under_autocast(module):
        function, inputs = function_and_inputs(module, name, dtype=torch.float32)

        def call(*leaves):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(*leaves)

        return value_and_gradients(call, inputs)

    exact = value_and_gradients(*function_and_inputs(plain, name, dtype=torch.float32, exact=True))
    for i, (found, by_autograd, reference) in enumerate(
        zip(under_autocast(fused), under_autocast(plain), exact, strict=True)
    ):
        assert found.dtype == by_autograd.dtype
        assert relative_error(found, reference) < 1.1 * relative_error(by_autograd, reference) + 1e-6
        if i == 0:  # both have bfloat16 logits, which change the value
            assert relative_error(found, by_autograd) < 1e-6 < relative_error(found, reference)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_leaves_float64_alone(name):
    function, inputs = function_and_inputs(fused, name)
    expected = function(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(*inputs), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(name, use_reentrant):
    function, inputs = function_and_inputs(fused, name)
    expected = value_and_gradients(function, inputs)
    found = value_and_gradients(
        lambda *leaves: checkpoint(
            lambda *args: function(args[0] * 1, *args[1:]), *leaves, use_reentrant=use_reentrant
        ),
        inputs,
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_cuda
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_cuda_matches_float64_autograd(name, dtype, tolerance):
    num_rows = 2 * fused.ROWS_PER_CHUNK + 3
    exact = value_and_gradients(*function_and_inputs(plain, name, num_rows, dtype, True, "cuda"))
    found = value_and_gradients(*function_and_inputs(fused, name, num_rows, dtype, False, "cuda"))
    for found_tensor, exact_tensor in zip(found, exact, strict=True):
        assert relative_error(found_tensor, exact_tensor) < tolerance


@needs_cuda
@pytest.mark.parametrize("name", LOSSES)
def test_cuda_bfloat16_has_float32_logits(name):
    if not fused._multiplies_into(torch.bfloat16, torch.device("cuda", 0), torch.float32):
        pytest.skip("this GPU or torch has no float32 results of bfloat16 products")
    num_rows = 2 * fused.ROWS_PER_CHUNK + 3
    exact, by_autograd, found = (
        value_and_gradients(*function_and_inputs(module, name, num_rows, torch.bfloat16, exact, "cuda"))
        for module, exact in ((plain, True), (plain, False), (fused, False))
    )
    assert relative_error(found[0], exact[0]) < 1e-5
    for found_tensor, autograd_tensor, exact_tensor in zip(found[1:], by_autograd[1:], exact[1:], strict=True):
        assert relative_error(found_tensor, exact_tensor) < 0.9 * relative_error(autograd_tensor, exact_tensor)
