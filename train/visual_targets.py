# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Rivals of the paper's visual loss, under the same trainer: what the setting `visual_target` chooses.

| `visual_target` | what learns at a patch | from what | source |
|---|---|---|---|
| `next_patch` | words of the position left of it | its visual token | the paper, arXiv 2403.07720 |
| `same_patch` | words of its own position | its visual token | the paper's loss, where the others have theirs |
| `feature` | hidden state of its own position | its image feature | as VDEP (2502.09093), ViCToR (2410.14332) |
| `basic` | its image feature | its hidden state in mid-decoder | BASIC (2508.06895) |

All cover the same patches, those with a position to their left, and are means over them: arms of one grid differ in
the loss alone. At its own position the decoder has read the patch: only `next_patch` asks for a prediction.

A rival takes the place of the loss of one model object, inside its forward, since what is computed outside it is
unseen by DDP and FSDP. The model's code does not know of rivals, nor does a folder that is saved.
"""

from functools import partial

import torch
import torch.nn.functional as F

from modeling_vtlmm.fused_losses_vtlmm import fused_visual_loss_sum
from modeling_vtlmm.layers_vtlmm import gathered_weight
from modeling_vtlmm.losses_vtlmm import (
    accumulation_dtype,
    predicted_positions,
    visual_loss_sum,
    visual_token_statistics,
)


BASIC_KL_COEF = 0.01  # BASIC's weight of the divergence beside the cosine


def feature_loss_sum(hidden_states: torch.Tensor, image_features: torch.Tensor) -> torch.Tensor:
    r"""
    Feature regression, summed: Σ_n mean_d SmoothL1(h_n[d] / rms(h_n) − v_n[d] / rms(v_n)).

    Of the kind of VDEP (arXiv 2502.09093, whose form is not published) and ViCToR (arXiv 2410.14332: 10 · SmoothL1
    behind a head of its own, with three quarters of the image features replaced, which is left out here). Without a
    head nothing else would bridge the scales of the two, so both have root mean square 1. A `visual_loss_coef` of 1
    is thus about 0.7 for unrelated vectors, whatever the model's scale.

    Args:
        hidden_states, image_features (`torch.Tensor` of shape `(N, D)`): row n of both belongs to the same patch.

    Returns:
        `torch.Tensor` of shape `()`: no unit; 0 (with a graph) when there are no rows.
    """
    dtype = accumulation_dtype(hidden_states.dtype)
    scaled = (F.rms_norm(states.to(dtype), states.shape[-1:], eps=1e-6) for states in (hidden_states, image_features))
    return F.smooth_l1_loss(*scaled, reduction="none").mean(-1).sum()


def basic_loss_sum(
    image_features: torch.Tensor, refined_features: torch.Tensor, embeddings: torch.Tensor, detach: bool = True
) -> torch.Tensor:
    r"""
    BASIC's loss (arXiv 2508.06895), summed: Σ_n 1 − cos(v_n, r_n) + 0.01 · KL(softmax(E r_n) ‖ softmax(E v_n)).

    Its code is not public; that the refined features are the first argument of the divergence, as teachers are
    everywhere here, is our reading.

    Args:
        image_features (`torch.Tensor` of shape `(N, D)`): the adapter's output v, which learns.
        refined_features (`torch.Tensor` of shape `(N, D)`): r, the same patches behind the decoder's lower half.
        embeddings (`torch.Tensor` of shape `(V, D)`): input embeddings E; a constant.
        detach (`bool`, *optional*, defaults to `True`): whether r is a constant.

    Returns:
        `torch.Tensor` of shape `()`: the divergence in nats; 0 (with a graph) when there are no rows.
    """
    refined_features = refined_features.detach() if detach else refined_features
    dtype, embeddings = accumulation_dtype(image_features.dtype), embeddings.detach()
    cosine = F.cosine_similarity(image_features.to(dtype), refined_features.to(dtype), dim=-1)
    divergence = fused_visual_loss_sum if detach else visual_loss_sum
    return (1 - cosine).sum() + BASIC_KL_COEF * divergence(image_features, embeddings, refined_features, embeddings)


def set_visual_target(model, visual_target: str) -> None:
    r"""
    Makes `visual_target` the visual loss of this model object, in place of what an earlier call made it.

    Args:
        model ([`VTLMMForConditionalGeneration`]): or its class from the Hub; not yet wrapped by an adapter.
        visual_target (`str`): of `stages.VISUAL_TARGETS`. `"basic"` needs the forward with `output_hidden_states`.
    """
    for name in ("loss_sums", "_visual_sides"):
        vars(model).pop(name, None)
    if visual_target == "same_patch":
        model._visual_sides = partial(_same_patch_sides, model, model._visual_sides)
    elif visual_target in ("feature", "basic"):
        model.loss_sums = partial(_rival_sums, model, model.loss_sums, visual_target)


def _at_patches(outputs, hidden_states, attention_mask, position_ids):
    """Image features, and hidden states at the same patches, `(N, D)` each."""
    image_features = outputs.image_features.flatten(0, 1)
    if outputs.image_token_mask is None:  # the image of zeros of a text-only batch
        return image_features[:0], hidden_states[0, :0]
    predicted = predicted_positions(outputs.image_token_mask, attention_mask, position_ids)
    return image_features[predicted[outputs.image_token_mask]], hidden_states[predicted]


def _same_patch_sides(model, own_sides, vm_head, outputs, attention_mask, position_ids):
    """As the model's `_visual_sides`, with the hidden states at the patches and not left of them."""
    image_side, (_, lm_weight) = own_sides(vm_head, outputs, attention_mask, position_ids)
    return image_side, (_at_patches(outputs, outputs.last_hidden_state, attention_mask, position_ids)[1], lm_weight)


def _rival_sums(
    model,
    own_sums,
    visual_target,
    outputs,
    labels,
    attention_mask=None,
    position_ids=None,
    visual_student=None,
    detach_visual_teacher=True,
):
    """As the model's `loss_sums`, with a rival as `visual_loss`; the statistics are those of the visual tokens."""
    sums = own_sums(outputs, labels, attention_mask, position_ids)
    if visual_student is None:
        return sums
    masks = attention_mask, position_ids
    if visual_target == "feature":
        image_features, states = _at_patches(outputs, outputs.last_hidden_state, *masks)
        target = image_features.detach() if detach_visual_teacher else image_features
        loss = feature_loss_sum(states, target)
    else:
        middle = outputs.hidden_states[
            (len(outputs.hidden_states) - 1) // 2
        ]  # behind half of the layers; 0: their input
        image_features, states = _at_patches(outputs, middle, *masks)
        embeddings = gathered_weight(model.get_input_embeddings())[: model.model.vm_head.weight.shape[0]]
        loss = basic_loss_sum(image_features, states, embeddings, detach_visual_teacher)
    image_side, text_side = model._visual_sides(model.model.vm_head, outputs, *masks)
    sums["visual_loss"] = loss
    sums["num_visual_targets"] = torch.tensor(len(image_features), device=image_features.device)
    sums["visual_tokens"] = visual_token_statistics(*image_side, *text_side)
    return sums
