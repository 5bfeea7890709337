# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The losses of VT-LMM (arXiv 2403.07720), one plain-torch function per equation.

These functions are the reference. The functions of `fused_losses_vtlmm` compute the same values with less memory and
are tested against them. All losses are *sums* in nats. The caller divides them by the number of tokens of
the optimizer step, across gradient accumulation and processes, since a mean of means would weight tokens differently.

Shapes: B batch, S sequence, N rows (positions that a loss covers), V vocabulary, D hidden size.
"""

import torch
import torch.nn.functional as F
from transformers.utils import torch_compilable_check


# The statistics are only logged, so they use at most this number of patches of a micro-batch.
MAX_STATISTICS_ROWS = 256


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the softmax: float64 for float64, else float32, since half precision is too coarse."""
    return torch.promote_types(dtype, torch.float32)


def language_loss_sum(features: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    r"""
    Return the summed language loss L_lm = −Σ_n log q_n[y_n] with q_n = softmax(W h_n).

    Args:
        features (`torch.Tensor` of shape `(N, D)`): hidden states h of the positions left of the targets.
        weight (`torch.Tensor` of shape `(V, D)`): weight W of `lm_head`.
        targets (`torch.LongTensor` of shape `(N,)`): target tokens y, without ignored positions.

    Returns:
        `torch.Tensor` of shape `()`: the sum in nats. Without rows it is 0 and still has a graph.
    """
    logits = F.linear(features, weight).to(accumulation_dtype(features.dtype))
    return F.cross_entropy(logits, targets, reduction="sum")


def visual_loss_sum(
    student_features: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_features: torch.Tensor,
    teacher_weight: torch.Tensor,
) -> torch.Tensor:
    r"""
    Return the summed visual loss L_vm = Σ_n KL(teacher_n ‖ student_n) between the predictions of two linear heads.

    In stage III the student is the VM head: KL(q ‖ p), with (image features, `vm_head`) as student and (hidden states,
    `lm_head`) as teacher. In stage IV the student is the decoder: KL(p ‖ q), with student and teacher exchanged.
    This function detaches nothing. The gradient reaches student and teacher unless the caller detaches one.

    Args:
        student_features, teacher_features (`torch.Tensor` of shape `(N, D)`): row n of both belongs to the same patch.
            The hidden state is the one of the position left of the patch.
        student_weight, teacher_weight (`torch.Tensor` of shape `(V, D)`): weights of the two heads, which must have
            the same vocabulary.

    Returns:
        `torch.Tensor` of shape `()`: the sum in nats. Without rows it is 0 and still has a graph.
    """
    dtype = accumulation_dtype(student_features.dtype)
    student_logprobs = F.log_softmax(F.linear(student_features, student_weight).to(dtype), dim=-1)
    teacher_logprobs = F.log_softmax(F.linear(teacher_features, teacher_weight).to(dtype), dim=-1)
    return F.kl_div(student_logprobs, teacher_logprobs, reduction="sum", log_target=True)


def pseudo_image_features(features: torch.Tensor, vm_weight: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    r"""
    Return the pseudo image features ṽ_n = p_n E with p_n = softmax(W_vm v_n).

    Args:
        features (`torch.Tensor` of shape `(N, D)`): image features v, after the residual block of the VM head.
        vm_weight (`torch.Tensor` of shape `(V, D)`): weight W_vm of `vm_head`.
        embeddings (`torch.Tensor` of shape `(V, D)`): input embeddings E of the first V tokens of the vocabulary.

    Returns:
        `torch.Tensor` of shape `(N, D)` in the dtype of `embeddings`.
    """
    logits = F.linear(features, vm_weight).to(accumulation_dtype(features.dtype))
    return F.softmax(logits, dim=-1).to(embeddings.dtype) @ embeddings


def text_labels(labels: torch.Tensor, image_token_id: int, vocab_size: int) -> torch.Tensor:
    r"""
    Return `labels` with −100 at the image tokens, which are not targets of the language loss.

    Args:
        labels (`torch.LongTensor` of shape `(B, S)`): token ids, −100 at positions without a target.
        image_token_id (`int`): id of the image token. It may be outside the vocabulary.
        vocab_size (`int`): number of rows of `lm_head`.

    Raises:
        `ValueError`: if any other id is neither −100 nor in the vocabulary. Checked for tensors on a CPU only, because
            the check would synchronize a GPU. On a GPU the loss kernel reports an index error.
    """
    labels = labels.masked_fill(labels == image_token_id, -100)
    if labels.device.type == "cpu":
        is_valid = (labels == -100) | ((labels >= 0) & (labels < vocab_size))
        torch_compilable_check(
            is_valid.all(),
            lambda: (
                f"`labels` contain the id {int(labels[~is_valid][0])}, which is outside the vocabulary of `lm_head` "
                f"({vocab_size} tokens). Use ids from 0 to {vocab_size - 1}, the image token {image_token_id}, or "
                "-100 for positions without a target."
            ),
        )
    return labels


def predicted_positions(
    token_mask: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Return a mask of the tokens of `token_mask` that have a left neighbor in the same row, which predicts them.

    The visual loss covers the image tokens at these positions. Excluded are the first position of a row, a position
    whose left neighbor is padding, and the first position of a packed row, where `position_ids` restarts at 0.

    Args:
        token_mask (`torch.BoolTensor` of shape `(B, S)`): candidate targets, e.g. the image tokens.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 on padding. A mask of another shape is
            not used.
        position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*): positions, with a restart at each packed row.

    Returns:
        `torch.BoolTensor` of shape `(B, S)`.
    """
    predicted = token_mask.clone()
    predicted[:, 0] = False
    if attention_mask is not None and attention_mask.ndim == 2:
        predicted[:, 1:] &= attention_mask[:, :-1].bool()
    if position_ids is not None:
        predicted &= position_ids.ne(0)
    return predicted


@torch.no_grad()
def visual_token_statistics(
    image_features: torch.Tensor, vm_weight: torch.Tensor, hidden_states: torch.Tensor, lm_weight: torch.Tensor
) -> dict[str, torch.Tensor]:
    r"""
    Return statistics of the visual tokens p and of the decoder's predictions q for the same patches, as sums.

    At most `MAX_STATISTICS_ROWS` evenly spaced patches are used. If the mean entropy of p_n and the entropy of the
    mean of p_n are both low, the visual tokens have collapsed: all patches predict the same word.

    Args:
        image_features (`torch.Tensor` of shape `(N, D)`): image features, after the residual block of the VM head.
        vm_weight (`torch.Tensor` of shape `(V, D)`): weight of `vm_head`.
        hidden_states (`torch.Tensor` of shape `(N, D)`): hidden states of the positions left of the patches.
        lm_weight (`torch.Tensor` of shape `(V, D)`): weight of `lm_head`.

    Returns:
        `dict[str, torch.Tensor]`:
            - `num_patches` of shape `()`: number of patches used.
            - `entropy` of shape `()`: sum of H(p_n) in nats.
            - `agreement` of shape `()`: number of patches for which both heads predict the same word.
            - `probability` of shape `(V,)`: sum of p_n.
            - `top_word` of shape `(V,)`: how often each word is the most likely one.
    """
    num_rows, vocab_size = image_features.shape[0], vm_weight.shape[0]
    stride = max(1, -(-num_rows // MAX_STATISTICS_ROWS))
    dtype = accumulation_dtype(image_features.dtype)
    logprobs = F.log_softmax(F.linear(image_features[::stride], vm_weight).to(dtype), dim=-1)
    probs = logprobs.exp()
    top_words = logprobs.argmax(-1)
    decoder_words = F.linear(hidden_states[::stride], lm_weight).argmax(-1)
    ones = torch.ones_like(top_words, dtype=dtype)
    return {
        "num_patches": ones.sum(),
        "entropy": -(probs * logprobs).sum(),
        "agreement": (top_words == decoder_words).sum().to(dtype),
        "probability": probs.sum(0),
        "top_word": torch.zeros(vocab_size, dtype=dtype, device=probs.device).index_add_(0, top_words, ones),
    }
