# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The losses of VT-LMM (arXiv 2403.07720), one plain-torch function per equation.

These are the definitions: every faster path in this package is a second implementation of one of them and is tested
against it. They return *sums* and leave the division to the caller, because the mean of the paper runs over all
tokens of an optimizer step: over gradient accumulation and over processes.

Shapes: B batch, S sequence, N rows (positions that a loss covers), V vocabulary, D hidden size.
"""

import torch
import torch.nn.functional as F


# Statistics of the visual tokens are for the log, so at most this many patches of a micro-batch are looked at.
MAX_STATISTICS_ROWS = 256


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision and float32, float64 for float64: a softmax over a vocabulary needs no less."""
    return torch.promote_types(dtype, torch.float32)


def language_loss_sum(features: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    r"""
    Language loss L_lm, summed: −Σ_n log q_n[y_n] with q_n = softmax(W h_n).

    Args:
        features (`torch.Tensor` of shape `(N, D)`): hidden states of the positions left of the targets.
        weight (`torch.Tensor` of shape `(V, D)`): weight of `lm_head`.
        targets (`torch.LongTensor` of shape `(N,)`): the words, without ignored positions.

    Returns:
        `torch.Tensor` of shape `()`: nats; 0 (with a graph) when there are no rows.
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
    Visual loss L_vm, summed: Σ_n KL(teacher_n ‖ student_n) between the predictions of two linear heads.

    Stage III teaches the VM head, KL(q ‖ p): the student is (image features, `vm_head`), the teacher (hidden states,
    `lm_head`). Stage IV teaches the decoder, KL(p ‖ q): student and teacher change places.
    Nothing is detached here: the caller decides what is a constant.

    Args:
        student_features, teacher_features (`torch.Tensor` of shape `(N, D)`): row n of both belongs to the same patch;
            the hidden state is that of the position to the left of the patch.
        student_weight, teacher_weight (`torch.Tensor` of shape `(V, D)`): the two heads, over the same V words.

    Returns:
        `torch.Tensor` of shape `()`: nats; 0 (with a graph) when there are no rows.
    """
    dtype = accumulation_dtype(student_features.dtype)
    student_logprobs = F.log_softmax(F.linear(student_features, student_weight).to(dtype), dim=-1)
    teacher_logprobs = F.log_softmax(F.linear(teacher_features, teacher_weight).to(dtype), dim=-1)
    return F.kl_div(student_logprobs, teacher_logprobs, reduction="sum", log_target=True)


def pseudo_image_features(features: torch.Tensor, vm_weight: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    r"""
    Pseudo image features: ṽ_n = p_n E with p_n = softmax(W_vm v_n), E the input embeddings of the first V words.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): image features (after the head's residual block).
        vm_weight (`torch.Tensor` of shape `(V, D)`): weight of `vm_head`.
        embeddings (`torch.Tensor` of shape `(V, D)`): input embeddings.

    Returns:
        `torch.Tensor` of shape `(N, D)` in the dtype of `embeddings`.
    """
    logits = F.linear(features, vm_weight).to(accumulation_dtype(features.dtype))
    return F.softmax(logits, dim=-1).to(embeddings.dtype) @ embeddings


def predicted_positions(
    token_mask: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Those positions of `token_mask` that have a position to their left to be predicted from.

    The first position of a row has none, nor has one whose left neighbor is padding, nor the first of a packed row
    (where `position_ids` restarts at 0).

    Args:
        token_mask (`torch.BoolTensor` of shape `(B, S)`): candidate targets, e.g. the image tokens.
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 on padding.
        position_ids (`torch.LongTensor` of shape `(B, S)`, *optional*).

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
    What the log says of the visual tokens p and of the decoder's predictions q at the same patches, as sums.

    Looks at no more than `MAX_STATISTICS_ROWS` evenly spaced patches. A low mean entropy beside a low entropy of the
    mean p is a collapse: every patch says the same word.

    Args:
        image_features (`torch.Tensor` of shape `(N, D)`), vm_weight (`torch.Tensor` of shape `(V, D)`)
        hidden_states (`torch.Tensor` of shape `(N, D)`), lm_weight (`torch.Tensor` of shape `(V, D)`)

    Returns:
        `dict`: `num_patches` (), `entropy` () the sum of H(p_n) in nats, `agreement` () patches where both heads have
        the same top word, `probability` (V,) the sum of p_n, `top_word` (V,) how often each word is on top.
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
