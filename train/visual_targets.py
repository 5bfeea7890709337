# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Alternatives to the paper's visual loss, selected by the setting `visual_target`.

| `visual_target` | student at a patch | teacher | source |
|---|---|---|---|
| `next_patch` | prediction of the position left of the patch | visual token of the patch | the paper (2403.07720) |
| `same_patch` | prediction of the patch's own position | visual token of the patch | ablation of `next_patch` |
| `feature` | hidden state of the patch | image feature of the patch | like VDEP (2502.09093), ViCToR (2410.14332) |
| `other_image` | prediction of the position left of the patch | visual token of another image's patch | control |
| `basic` | image feature of the patch | hidden state in the middle of the decoder | BASIC (2508.06895) |

All losses cover the same patches, those with a position to their left, so that trainings differ in the loss alone.
Only `next_patch` is a prediction: at its own position the decoder has already read the patch. `other_image` is its
control: the same loss with targets that describe another image, so they are often wrong.

The functions of this file are values for `model.visual_loss_function`, which the model calls in its forward. A loss
outside the forward would not work with DDP and FSDP. Saved checkpoints do not depend on the visual target.
"""

import torch
import torch.nn.functional as F

from modeling_vtlmm.fused_losses_vtlmm import fused_visual_loss_sum, next_patch_loss
from modeling_vtlmm.layers_vtlmm import gathered_weight
from modeling_vtlmm.losses_vtlmm import accumulation_dtype, visual_loss_sum


BASIC_KL_COEF = 0.01  # BASIC's weight of the divergence, relative to the cosine term


def feature_loss_sum(hidden_states: torch.Tensor, image_features: torch.Tensor) -> torch.Tensor:
    r"""
    Return the summed feature regression Σ_n mean_d SmoothL1(h_n[d] / rms(h_n) − v_n[d] / rms(v_n)).

    This loss is similar to those of VDEP (arXiv 2502.09093, which does not publish its equation) and ViCToR (arXiv
    2410.14332, which uses 10 · SmoothL1 after an additional head and replaces three quarters of the image features).
    Without an additional head, h and v differ in scale, so both are normalized to a root mean square of 1. The mean
    over the rows is about 0.7 for unrelated vectors.

    Args:
        hidden_states, image_features (`torch.Tensor` of shape `(N, D)`): row n of both belongs to the same patch.

    Returns:
        `torch.Tensor` of shape `()`: the sum, without unit. Without rows it is 0 and still has a graph.
    """
    dtype = accumulation_dtype(hidden_states.dtype)
    student, target = (
        F.rms_norm(states.to(dtype), states.shape[-1:], eps=1e-6) for states in (hidden_states, image_features)
    )
    return F.smooth_l1_loss(student, target, reduction="none").mean(-1).sum()


def basic_loss_sum(
    image_features: torch.Tensor, refined_features: torch.Tensor, embeddings: torch.Tensor, detach: bool = True
) -> torch.Tensor:
    r"""
    Return BASIC's summed loss (arXiv 2508.06895), Σ_n 1 − cos(v_n, r_n) + 0.01 · KL(softmax(E r_n) ‖ softmax(E v_n)).

    BASIC's code is not public. The paper does not specify the order of the divergence. We use the refined features as
    the teacher, as in all other losses of this package.

    Args:
        image_features (`torch.Tensor` of shape `(N, D)`): the projector's output v, the student.
        refined_features (`torch.Tensor` of shape `(N, D)`): hidden states r of the same patches in the middle of the
            decoder, the teacher.
        embeddings (`torch.Tensor` of shape `(V, D)`): input embeddings E, which get no gradient.
        detach (`bool`, *optional*, defaults to `True`): whether r gets no gradient.

    Returns:
        `torch.Tensor` of shape `()`: the sum, with the divergence in nats. Without rows it is 0 and still has a graph.
    """
    refined_features = refined_features.detach() if detach else refined_features
    dtype, embeddings = accumulation_dtype(image_features.dtype), embeddings.detach()
    cosine = F.cosine_similarity(image_features.to(dtype), refined_features.to(dtype), dim=-1)
    divergence = fused_visual_loss_sum if detach else visual_loss_sum
    return (1 - cosine).sum() + BASIC_KL_COEF * divergence(image_features, embeddings, refined_features, embeddings)


def set_visual_target(model, visual_target: str) -> None:
    r"""
    Set `model.visual_loss_function` to the loss of `visual_target`. A function that the user assigned is kept.

    Args:
        model ([`VTLMMForConditionalGeneration`]): the model, before an adapter wraps it.
        visual_target (`str`): one of `stages.VISUAL_TARGETS`. `"basic"` needs `output_hidden_states` in the forward.

    Raises:
        `ValueError`: if the user assigned a function, and `visual_target` names another one.
    """
    losses = {
        "next_patch": next_patch_loss,
        "same_patch": same_patch_loss,
        "other_image": other_image_loss,
        "feature": feature_loss,
        "basic": basic_loss,
    }
    if model.visual_loss_function in losses.values():
        model.visual_loss_function = losses[visual_target]
    elif visual_target != "next_patch":
        raise ValueError(
            f"`visual_target` is {visual_target!r}, but `model.visual_loss_function` is a function of your own. Use "
            "only one of the two."
        )


def same_patch_loss(
    student_features, student_weight, teacher_features, teacher_weight, *, visual_student, outputs, positions, **kwargs
) -> torch.Tensor:
    """Return the paper's visual loss with the hidden states at the patches instead of the positions to their left."""
    hidden_states = outputs.last_hidden_state[positions]
    if visual_student == "lm_head":
        return next_patch_loss(hidden_states, student_weight, teacher_features, teacher_weight, **kwargs)
    return next_patch_loss(student_features, student_weight, hidden_states, teacher_weight, **kwargs)


def other_image_loss(
    student_features,
    student_weight,
    teacher_features,
    teacher_weight,
    *,
    visual_student,
    model,
    outputs,
    positions,
    **kwargs,
) -> torch.Tensor:
    """
    Return the paper's visual loss with the visual tokens of the batch's next image, patch by patch.

    A batch with one image, such as the last one of an epoch, has no other image: its loss is 0.
    """
    if outputs.image_features.shape[0] < 2:
        return 0.0 * (student_features.sum() + student_weight.sum())
    vm_head = model.model.vm_head
    other_images = vm_head.residual_block(outputs.image_features.roll(-1, 0)).flatten(0, 1)
    other_features = other_images[positions[outputs.image_token_mask]]
    if visual_student == "lm_head":
        return next_patch_loss(student_features, student_weight, other_features, teacher_weight, **kwargs)
    return next_patch_loss(other_features, student_weight, teacher_features, teacher_weight, **kwargs)


def feature_loss(*features_and_weights, detach_teacher, outputs, positions, **kwargs) -> torch.Tensor:
    """Return [`feature_loss_sum`] of the last hidden states at the patches."""
    image_features = _image_features(outputs, positions)
    image_features = image_features.detach() if detach_teacher else image_features
    return feature_loss_sum(outputs.last_hidden_state[positions], image_features)


def basic_loss(*features_and_weights, detach_teacher, model, outputs, positions, **kwargs) -> torch.Tensor:
    """Return [`basic_loss_sum`] of the hidden states after the lower half of the decoder's layers."""
    middle = (len(outputs.hidden_states) - 1) // 2  # hidden_states[0] is the input of the first layer
    refined_features = outputs.hidden_states[middle][positions]
    embeddings = gathered_weight(model.get_input_embeddings())[: model.config.visual_vocab_size]
    return basic_loss_sum(_image_features(outputs, positions), refined_features, embeddings, detach_teacher)


def _image_features(outputs, positions) -> torch.Tensor:
    """Return the projector's output v of the patches at `positions`, `(N, D)`."""
    return outputs.image_features.flatten(0, 1)[positions[outputs.image_token_mask]]
