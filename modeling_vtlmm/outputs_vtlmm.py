# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Output classes of the VT-LMM models."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)


@dataclass
class VTLMMImageFeaturesOutput(BaseModelOutputWithPooling):
    """
    Output of the vision tower and the projector.

    Layers above the highest one of `vision_feature_layer` are skipped where the tower allows it. With -2, the last
    layer is skipped, so
    `last_hidden_state` and `hidden_states[-1]` equal the output of the layer before, and `attentions` has no entry for
    the skipped layer.

    Args:
        pooler_output (`list[torch.Tensor]` of shape `(num_patches, hidden_size)`): the decoder's input, one tensor per
            image. Contains the pseudo image features if `config.use_pseudo_image_features` is set.
        vision_features (`torch.Tensor` of shape `(num_images, num_patches, vision_feature_size)`): the projector's
            input.
        image_features (`torch.Tensor` of shape `(num_images, num_patches, hidden_size)`): the projector's output v.
    """

    pooler_output: list[torch.Tensor] | None = None  # type: ignore[assignment]  # the contract of transformers 5
    vision_features: torch.Tensor | None = None
    image_features: torch.Tensor | None = None


class _WithImageFeatures:
    image_outputs: VTLMMImageFeaturesOutput | None

    @property
    def image_features(self) -> torch.Tensor | None:
        """Return the projector's output v, `(num_images, num_patches, hidden_size)`, or `None` without images."""
        return None if self.image_outputs is None else self.image_outputs.image_features


@dataclass
class VTLMMModelOutputWithPast(_WithImageFeatures, BaseModelOutputWithPast):
    """
    Output of the decoder.

    Args:
        image_outputs ([`VTLMMImageFeaturesOutput`], *optional*): output for the images of the batch.
        image_token_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): positions of the
            image tokens. Returned with `output_image_token_mask=True`.
    """

    image_outputs: VTLMMImageFeaturesOutput | None = None
    image_token_mask: torch.Tensor | None = None


@dataclass
class VTLMMCausalLMOutputWithPast(_WithImageFeatures, CausalLMOutputWithPast):
    """
    Output of the model with its language modeling head. `loss` is the mean language loss L_lm in nats.

    Args:
        visual_logits (`torch.Tensor` of shape `(num_image_tokens, visual_vocab_size)`, *optional*): the VM head's
            output before the softmax, in the order of `image_token_mask`. Returned with `output_visual_logits=True`.
        image_outputs ([`VTLMMImageFeaturesOutput`], *optional*): output for the images of the batch.
        image_token_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): positions of the
            image tokens. Returned with `output_visual_logits=True`.
        loss_sums (`dict`, *optional*): see [`VTLMMForConditionalGeneration.loss_sums`]. Returned with
            `return_loss_sums=True`, as the only field.
    """

    visual_logits: torch.Tensor | None = None
    image_outputs: VTLMMImageFeaturesOutput | None = None
    image_token_mask: torch.Tensor | None = None
    loss_sums: dict[str, Any] | None = None


@dataclass
class VTLMMVisualTokensOutput(ModelOutput):
    """
    The most likely words of the visual token of each patch.

    Args:
        token_ids (`torch.LongTensor` of shape `(num_images, num_patches, top_k)`): the words, most likely first.
        probabilities (`torch.Tensor` of shape `(num_images, num_patches, top_k)`): their probabilities.
    """

    token_ids: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
