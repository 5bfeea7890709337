# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""What the models of VT-LMM return."""

from dataclasses import dataclass

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
    The vision tower's output, of which only what `vision_feature_layer` needs is computed (with -2, the last layer
    passes its input on: `last_hidden_state` and `hidden_states[-1]` lack it, `attentions` has no entry), and:

    pooler_output (`list[torch.Tensor]` of shape `(num_patches, hidden_size)`): what the decoder gets, one per image.
    vision_features (`torch.Tensor` of shape `(num_images, num_patches, vision_feature_size)`): the projector's input.
    image_features (`torch.Tensor` of shape `(num_images, num_patches, hidden_size)`): the projector's output v.
    """

    vision_features: torch.Tensor | None = None
    image_features: torch.Tensor | None = None


class _WithImageFeatures:
    @property
    def image_features(self) -> torch.Tensor | None:
        """The projector's output v, `(num_images, num_patches, hidden_size)`, when there are images."""
        return None if self.image_outputs is None else self.image_outputs.image_features


@dataclass
class VTLMMModelOutputWithPast(_WithImageFeatures, BaseModelOutputWithPast):
    """
    The decoder's output and:

    image_outputs ([`VTLMMImageFeaturesOutput`]): what became of the images, when there are any; its
        `image_features` are also those of this output.
    image_token_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): where the image tokens are,
        when asked for.
    """

    image_outputs: VTLMMImageFeaturesOutput | None = None
    image_token_mask: torch.Tensor | None = None


@dataclass
class VTLMMCausalLMOutputWithPast(_WithImageFeatures, CausalLMOutputWithPast):
    """
    The base class's fields (`loss`: mean language loss L_lm in nats, when `labels` are given) and:

    visual_logits (`torch.Tensor` of shape `(num_image_tokens, visual_vocab_size)`): the VM head's output before the
        softmax, in the order of `image_token_mask`, when asked for.
    image_outputs: see [`VTLMMModelOutputWithPast`].
    image_token_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): where the image tokens are, with
        `visual_logits`.
    loss_sums (`dict[str, torch.Tensor]`): see [`VTLMMForConditionalGeneration.loss_sums`], when asked for, alone.
    """

    visual_logits: torch.Tensor | None = None
    image_outputs: VTLMMImageFeaturesOutput | None = None
    image_token_mask: torch.Tensor | None = None
    loss_sums: dict[str, torch.Tensor] | None = None


@dataclass
class VTLMMVisualTokensOutput(ModelOutput):
    """
    token_ids (`torch.LongTensor` of shape `(num_images, num_patches, top_k)`): the most likely words, best first.
    probabilities (`torch.Tensor` of shape `(num_images, num_patches, top_k)`): their probabilities.
    """

    token_ids: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
