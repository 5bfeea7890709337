# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The losses of `losses_vtlmm` computed in chunks of rows, without an (N, V) tensor in memory.

For both losses the gradient with respect to the logits is softmax(logits) − target, which is known in the forward
pass. For each chunk, the forward pass computes the logits, the loss, and the gradients of the features and of the
weight. The next chunk overwrites the logits. The backward pass only multiplies the stored gradients by the incoming
gradient.

Related: TRL's chunked divergence, flash-linear-attention's FusedKLDivLoss, Liger's fused losses, Apple's CCE.

Shapes: N rows, C rows of a chunk, V vocabulary, D hidden size. G is the (C, V) gradient with respect to the logits.
"""

import functools
import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .losses_vtlmm import accumulation_dtype, pseudo_image_features, visual_loss_sum


# Maximum number of rows of a chunk. The chunks of a call have nearly equal sizes, since each chunk reads and writes a
# (V, D) gradient. Below about 700 rows, a GPU spends more time on adding to this gradient than on the product.
ROWS_PER_CHUNK = 1024
# On a CPU the (C, V) logits dominate the memory. With fewer rows the products are slower, because each one reads the
# whole weight (on a Zen 4 with AVX2 by 17 % at 144 rows, 11 % at 192 and 3 % at 288, compared with 576 rows).
ROWS_PER_CHUNK_CPU = 288
# A block of logits should fit into the cache of each thread (4 rows of 32000 tokens in float32 are 0.5 MB).
LOGITS_PER_BLOCK_AND_THREAD_CPU = 2**17


def next_patch_loss(
    student_features: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_features: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    detach_teacher: bool = True,
    row_losses: list | None = None,
    **kwargs,
) -> torch.Tensor:
    r"""
    Return the paper's visual loss, Σ_n KL(teacher_n ‖ student_n). The default `visual_loss_function` of the model.

    Args:
        student_features, student_weight, teacher_features, teacher_weight: see [`visual_loss_sum`].
        detach_teacher (`bool`, *optional*, defaults to `True`): whether the teacher gets no gradient.
        row_losses (`list`, *optional*): see [`fused_visual_loss_sum`]. Unchanged without `detach_teacher`.
        kwargs: arguments for other visual losses; see [`VTLMMForConditionalGeneration.loss_sums`].
    """
    arguments = student_features, student_weight, teacher_features, teacher_weight
    return fused_visual_loss_sum(*arguments, row_losses) if detach_teacher else visual_loss_sum(*arguments)


def fused_visual_loss_sum(
    student_features: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_features: torch.Tensor,
    teacher_weight: torch.Tensor,
    row_losses: list | None = None,
) -> torch.Tensor:
    r"""
    Return the summed visual loss L_vm = Σ_n KL(teacher_n ‖ student_n), as [`visual_loss_sum`] with a detached teacher.

    The teacher gets no gradient, even if it shares a weight with the student. The backward can run only once, because
    it scales the stored gradient in place. Second derivatives are not available.

    Args:
        student_features, teacher_features (`torch.Tensor` of shape `(N, D)`): row n of both belongs to the same patch.
            Student and teacher may differ in D and in dtype.
        student_weight, teacher_weight (`torch.Tensor` of shape `(V, D)`): weights of the two heads, which must have
            the same vocabulary.
        row_losses (`list`, *optional*): gets the losses of the rows, a tensor of shape `(N,)` without a graph.

    Returns:
        `torch.Tensor` of shape `()`: the sum in nats, in float32 (float64 for float64). Without rows it is 0 and still
            has a graph.

    Raises:
        `ValueError`: if student and teacher differ in N or V.
    """
    student_size = student_features.shape[0], student_weight.shape[0]
    teacher_size = teacher_features.shape[0], teacher_weight.shape[0]
    if student_size != teacher_size:
        raise ValueError(
            f"The student has (rows, vocabulary) {student_size}, but the teacher has {teacher_size}. Both must be "
            "equal: slice the larger one."
        )
    teacher_features, teacher_weight = (
        tensor.detach().to(_product_dtype(tensor)) for tensor in (teacher_features, teacher_weight)
    )
    tile = _logits_tile(student_features, teacher_weight)

    def divergence(student_logits, rows, grad_dtype):
        teacher_logits = _multiply(teacher_features[rows], teacher_weight.t(), tile[: len(student_logits)])
        return _run(_divergence, _divergence_in_blocks, student_logits, teacher_logits, grad_dtype)

    return _linear_loss_sum(student_features, student_weight, divergence, row_losses)


def fused_language_loss_sum(
    features: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, row_losses: list | None = None
) -> torch.Tensor:
    r"""
    Return the summed language loss L_lm = −Σ_n log q_n[y_n] with q_n = softmax(W h_n), as [`language_loss_sum`].

    The backward can run only once. Second derivatives are not available.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): hidden states h of the positions left of the targets.
        weight (`torch.Tensor` of shape `(V, D)`): weight W of `lm_head`.
        targets (`torch.LongTensor` of shape `(N,)`): target tokens y, without ignored positions.
        row_losses (`list`, *optional*): see [`fused_visual_loss_sum`].

    Returns:
        `torch.Tensor` of shape `()`: the sum in nats, in float32 (float64 for float64). Without rows it is 0 and still
            has a graph.
    """

    def cross_entropy(logits, rows, grad_dtype):
        return _run(_cross_entropy, _cross_entropy_in_blocks, logits, targets[rows], grad_dtype)

    return _linear_loss_sum(features, weight, cross_entropy, row_losses)


def fused_pseudo_image_features(
    features: torch.Tensor, vm_weight: torch.Tensor, embeddings: torch.Tensor
) -> torch.Tensor:
    r"""
    Return the pseudo image features ṽ_n = p_n E with p_n = softmax(W_vm v_n), as [`pseudo_image_features`].

    The visual tokens p are not stored. The backward computes them a second time.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): image features v, after the residual block of the VM head.
        vm_weight (`torch.Tensor` of shape `(V, D)`): weight W_vm of `vm_head`.
        embeddings (`torch.Tensor` of shape `(V, D)`): input embeddings E.

    Returns:
        `torch.Tensor` of shape `(N, D)` in the dtype of `embeddings`, or in the autocast dtype under autocast.
    """
    # torch.compile cannot trace the chunks, and meta tensors have no autocast dtype.
    if torch.compiler.is_compiling() or features.is_meta:
        return pseudo_image_features(features, vm_weight, embeddings)
    return _PseudoImageFeatures.apply(features, vm_weight, embeddings)


class _LinearLossSum(torch.autograd.Function):
    r"""
    Sum a loss of the logits X Wᵀ over chunks of rows.

    `chunk_loss(logits (C, V), rows, grad_dtype)` returns the losses (C,) and their gradient G (C, V).
    """

    @staticmethod
    def forward(ctx, features, weight, chunk_loss, row_losses):
        needs_features, needs_weight = ctx.needs_input_grad[:2]
        ctx.dtypes = features.dtype, weight.dtype
        features, weight = (tensor.to(_product_dtype(tensor)) for tensor in (features, weight))
        grad_dtype = features.dtype if needs_features or needs_weight else None

        tile = _logits_tile(features, weight)
        losses = tile.new_empty(len(features))
        # Gradients stay in float32 until the backward has scaled them, so float16 cannot overflow.
        grad_features = tile.new_empty(features.shape) if needs_features else None
        # The first chunk writes to `grad_weight` and the other chunks add to it. Without rows it must be 0.
        new_weight = tile.new_empty if len(features) else tile.new_zeros
        grad_weight = new_weight(weight.shape) if needs_weight else None

        with torch.autocast(features.device.type, enabled=False):
            for rows in _chunks(features):
                inputs = features[rows]
                logits = _multiply(inputs, weight.t(), tile[: len(inputs)])
                losses[rows], gradient = chunk_loss(logits, rows, grad_dtype)
                gradient = None if grad_dtype is None else gradient.to(grad_dtype)
                if needs_features:
                    _multiply(gradient, weight, grad_features[rows])
                if needs_weight:
                    _add_product(grad_weight, gradient.t(), inputs, beta=0 if rows.start == 0 else 1)
                # Free G before the next chunk allocates its own.
                del gradient
        ctx.gradients = grad_features, grad_weight
        if row_losses is not None:
            row_losses.append(losses)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if ctx.gradients is None:
            raise RuntimeError(
                "backward() ran a second time through a fused loss, whose gradient is stored in the forward and freed "
                "by the first backward. Compute the loss again, or use the plain function in losses_vtlmm."
            )
        gradients, ctx.gradients = ctx.gradients, None
        grad_features, grad_weight = (
            None if gradient is None else gradient.mul_(grad_output).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return grad_features, grad_weight, None, None


def _linear_loss_sum(features, weight, chunk_loss, row_losses):
    # `needs_input_grad` ignores no_grad, so evaluation would compute gradients without this detach.
    if not torch.is_grad_enabled():
        features, weight = features.detach(), weight.detach()
    return _LinearLossSum.apply(features, weight, chunk_loss, row_losses)


class _PseudoImageFeatures(torch.autograd.Function):
    r"""Compute ṽ = softmax(v Wᵀ) E in chunks of rows, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx, features, vm_weight, embeddings):
        tensors = features, vm_weight, embeddings
        ctx.save_for_backward(*tensors)
        # The backward may run outside the autocast context of the forward.
        ctx.dtypes = [_product_dtype(tensor) for tensor in tensors]
        features, vm_weight, embeddings = map(torch.Tensor.to, tensors, ctx.dtypes)
        tile = _logits_tile(features, vm_weight)
        outputs = embeddings.new_empty(features.shape[0], embeddings.shape[1])
        with torch.autocast(features.device.type, enabled=False):
            for rows in _chunks(features):
                probs = _softmax_(_multiply(features[rows], vm_weight.t(), tile[: len(features[rows])]))
                _multiply(probs.to(embeddings.dtype), embeddings, outputs[rows])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_outputs):
        needs_features, needs_weight, needs_embeddings = ctx.needs_input_grad
        saved_tensors = ctx.saved_tensors  # gradient checkpointing allows only one access
        features, vm_weight, embeddings = map(torch.Tensor.to, saved_tensors, ctx.dtypes)
        grad_features, grad_weight, grad_embeddings = gradients = [
            torch.zeros_like(tensor, dtype=accumulation_dtype(tensor.dtype)) if needed else None
            for tensor, needed in zip(saved_tensors, ctx.needs_input_grad, strict=True)
        ]
        tile, grad_tile = _logits_tile(features, vm_weight), _logits_tile(features, vm_weight)
        with torch.autocast(features.device.type, enabled=False):
            for rows in _chunks(features):
                inputs, grad_rows = features[rows], grad_outputs[rows]
                probs = _softmax_(_multiply(inputs, vm_weight.t(), tile[: len(inputs)]))
                if needs_embeddings:
                    _add_product(grad_embeddings, probs.to(embeddings.dtype).t(), grad_rows)
                if needs_features or needs_weight:
                    grad_probs = _multiply(grad_rows, embeddings.t(), grad_tile[: len(inputs)])
                    gradient = _softmax_backward_(probs, grad_probs).to(features.dtype)
                if needs_features:
                    _multiply(gradient, vm_weight, grad_features[rows])
                if needs_weight:
                    _add_product(grad_weight, gradient.t(), inputs)
        return tuple(
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(gradients, saved_tensors, strict=True)
        )


def _divergence(student_logits, teacher_logits, grad_dtype):
    """Return the divergences (C,) and G (C, V). torch.compile fuses this function into one kernel."""
    student_logprobs, teacher_logprobs = F.log_softmax(student_logits, -1), F.log_softmax(teacher_logits, -1)
    teacher_probs = teacher_logprobs.exp()
    losses = (teacher_probs * (teacher_logprobs - student_logprobs)).sum(-1)
    if grad_dtype is None:
        return losses, None
    return losses, (student_logprobs.exp() - teacher_probs).to(grad_dtype)


def _divergence_in_blocks(student_logits, teacher_logits, grad_dtype):
    """Return the values of [`_divergence`] without a compiler. G overwrites the student's logits."""
    losses = []
    for student, teacher in _blocks(student_logits, teacher_logits):
        # log Σ exp z = max z − log max softmax(z) avoids a second pass of exponentials.
        constants = student.amax(-1) - teacher.amax(-1)
        teacher_probs = teacher.softmax(-1)
        constants += teacher_probs.amax(-1).log() + torch.linalg.vecdot(teacher_probs, teacher.sub_(student))
        student_probs = torch.softmax(student, -1, out=teacher)
        losses.append(constants - student_probs.amax(-1).log())
        if grad_dtype is not None:
            torch.sub(student_probs, teacher_probs, out=student)
    return torch.cat(losses), student_logits


def _cross_entropy(logits, targets, grad_dtype):
    """Return the cross-entropies (C,) and G (C, V). With torch.compile the one-hot target is never stored."""
    logprobs = F.log_softmax(logits, -1)
    losses = -logprobs.gather(1, targets[:, None])[:, 0]
    if grad_dtype is None:
        return losses, None
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    return losses, (logprobs.exp() - is_target.to(logprobs.dtype)).to(grad_dtype)


def _cross_entropy_in_blocks(logits, targets, grad_dtype):
    """Return the values of [`_cross_entropy`] without a compiler. G overwrites the logits."""
    losses = []
    for block, words in _blocks(logits, targets[:, None]):
        probs = block.softmax(-1)
        losses.append(block.amax(-1) - block.gather(1, words)[:, 0] - probs.amax(-1).log())
        if grad_dtype is not None:
            block.copy_(probs).scatter_add_(1, words, probs.new_full(words.shape, -1.0))
    return torch.cat(losses), logits


_compiled: dict[Callable, Callable | None] = {}


def _run(definition, in_blocks, logits, *arguments):
    """Run `definition` under torch.compile on CUDA. Run `in_blocks` on other devices or if the compilation fails."""
    if logits.is_cuda and definition not in _compiled:
        # The number of rows varies between batches. torch.compile makes it dynamic at the second size.
        _compiled[definition] = torch.compile(definition)
    compiled = _compiled[definition] if logits.is_cuda else None
    if compiled is not None:
        try:
            return compiled(logits, *arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a missing Triton or C compiler and an old driver raise different types
            _compiled[definition] = None
            message = f"torch.compile failed, so the VT-LMM losses run uncompiled and slower: {error}"
            warnings.warn(message, stacklevel=2)
    return in_blocks(logits, *arguments)


def _softmax_(logits):
    for (block,) in _blocks(logits):
        block.copy_(block.softmax(-1))
    return logits


def _softmax_backward_(probs, grad_probs):
    for block, grad_block in _blocks(probs, grad_probs):
        grad_block.sub_(torch.linalg.vecdot(block, grad_block)[:, None]).mul_(block)
    return grad_probs


def _rows_per_chunk(features):
    limit = ROWS_PER_CHUNK_CPU if features.device.type == "cpu" else ROWS_PER_CHUNK
    num_chunks = math.ceil(features.shape[0] / limit)
    return math.ceil(features.shape[0] / num_chunks) if num_chunks else 0


def _chunks(features):
    size = _rows_per_chunk(features)
    return [slice(start, start + size) for start in range(0, features.shape[0], size or 1)]


def _blocks(logits, *others):
    num_rows, vocab_size = logits.shape
    if logits.device.type == "cpu":
        num_rows = max(1, LOGITS_PER_BLOCK_AND_THREAD_CPU * torch.get_num_threads() // vocab_size)
    return zip(*(tensor.split(num_rows) for tensor in (logits, *others)), strict=True)


def _logits_tile(features, weight):
    """Return a buffer for the logits of all chunks. New memory for each chunk would cause page faults on a CPU."""
    size = _rows_per_chunk(features), weight.shape[0]
    return torch.empty(size, dtype=accumulation_dtype(features.dtype), device=features.device)


def _product_dtype(tensor):
    """Return the dtype in which F.linear would multiply `tensor`. Autocast does not change float64."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype


@functools.cache
def _multiplies_into(dtype, device, out_dtype):
    """Return whether the device can write products of `dtype` to `out_dtype` unrounded (half to float32 on CUDA)."""
    operand = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, dtype=out_dtype, device=device)
    # torch does not document which devices support these arguments, so try them.
    try:
        torch.mm(operand, operand, out_dtype=out_dtype, out=out)
        torch.addmm(out, operand, operand, out_dtype=out_dtype, out=out)
    except (RuntimeError, TypeError):
        return False
    return True


def _multiply(left, right, out):
    """Compute out = left @ right, unrounded if the device supports it, else rounded as in F.linear."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if _multiplies_into(left.dtype, left.device, out.dtype):
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return out.copy_(left @ right)


def _add_product(out, left, right, beta=1):
    """Compute out = beta · out + left @ right with an unrounded product."""
    if left.dtype != out.dtype and _multiplies_into(left.dtype, left.device, out.dtype):
        return torch.addmm(out, left, right, out_dtype=out.dtype, beta=beta, out=out)
    return out.addmm_(left.to(out.dtype), right.to(out.dtype), beta=beta)
