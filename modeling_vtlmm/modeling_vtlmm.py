# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""VT-LMM (arXiv 2403.07720): a LLaVA-like model whose VM head maps each image feature to a distribution over words."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .configuration_vtlmm import VTLMMConfig
from .fused_losses_vtlmm import fused_language_loss_sum, fused_pseudo_image_features, next_patch_loss
from .generation_vtlmm import VTLMMGenerationMixin
from .layers_vtlmm import (
    VTLMMProjector,
    VTLMMVisualHead,
    gathered_weight,
    image_predictions,
    select_vision_features,
    skip_unused_layers,
    zero_image,
)
from .losses_vtlmm import predicted_positions, text_labels, visual_token_statistics
from .outputs_vtlmm import (
    VTLMMCausalLMOutputWithPast,
    VTLMMImageFeaturesOutput,
    VTLMMModelOutputWithPast,
    VTLMMVisualTokensOutput,
)
from .pretrained_vtlmm import VTLMMPreTrainedModel


# Fields of the decoder's output that are passed on. Others, such as `router_logits`, are dropped.
DECODER_OUTPUTS = {field.name for field in fields(VTLMMModelOutputWithPast)}


class VTLMMModel(VTLMMPreTrainedModel):
    """Vision tower, projector, VM head and decoder, without the language modeling head."""

    def __init__(self, config: VTLMMConfig):
        super().__init__(config)
        if config.is_convolutional:  # such towers accept only "eager"
            config.vision_config._attn_implementation = "eager"
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = VTLMMProjector(config)
        self.vm_head = VTLMMVisualHead(config)
        self.language_model = AutoModel.from_config(config.text_config)
        skip_unused_layers(self.vision_tower, config)
        self.post_init()
        # CLIP and SigLIP also list the layers of their text models, which FSDP would not find.
        no_split = set(self._no_split_modules or ())
        self._no_split_modules = {type(module).__name__ for module in self.modules()} & no_split

    def train(self, mode: bool = True):
        """Set the training mode, but keep a frozen vision tower in evaluation mode.

        Otherwise the tower would apply dropout and update batch-norm statistics."""
        super().train(mode)
        if not any(p.requires_grad for p in self.vision_tower.parameters()):
            self.vision_tower.eval()
        return self

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values=None, vision_features=None, **kwargs) -> VTLMMImageFeaturesOutput:
        r"""
        Return the image features v = g(f(I)) of the vision tower f and the projector g.

        `pooler_output`, a name of transformers, is the input of the decoder: v, or with
        `config.use_pseudo_image_features` ṽ = softmax(vm_head(v)) E.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*): the images I.
            vision_features (`torch.Tensor` of shape `(num_images, num_patches, vision_feature_size)`, *optional*):
                precomputed features f(I) of `vision_feature_layer`, instead of `pixel_values`. The vision tower is not
                called.
        """
        outputs = BaseModelOutput()
        if vision_features is None:
            # Not a list of layers: transformers counts them in different ways before and after 5.24.
            arguments = {**kwargs, "output_hidden_states": True, "return_dict": True}
            outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), **arguments)
            vision_features = select_vision_features(outputs, self.config)
        decoder_input = image_features = self.multi_modal_projector(vision_features)
        # Pseudo image features replace the image features here. The paper's released vwPifLlama models use them.
        if self.config.use_pseudo_image_features:
            decoder_input = self.get_pseudo_image_features(image_features)
        return VTLMMImageFeaturesOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=list(decoder_input),
            hidden_states=outputs.hidden_states if kwargs.get("output_hidden_states") else None,
            attentions=getattr(outputs, "attentions", None),
            vision_features=vision_features,
            image_features=image_features,
        )

    def get_pseudo_image_features(self, image_features: torch.Tensor) -> torch.Tensor:
        """Return ṽ = softmax(vm_head(v)) E for image features v. Both are `(num_images, num_patches, hidden_size)`."""
        features = self.vm_head.residual_block(image_features)
        vm_weight = gathered_weight(self.vm_head).to(features.device)
        embeddings = gathered_weight(self.get_input_embeddings())[: vm_weight.shape[0]].to(features.device)
        pseudo = fused_pseudo_image_features(features.flatten(0, 1), vm_weight, embeddings)
        return pseudo.view(*image_features.shape[:-1], -1)

    def get_image_token_mask(self, input_ids, inputs_embeds, num_image_features: int | None = None) -> torch.Tensor:
        r"""
        Return the positions of the image tokens, `(batch_size, sequence_length)`.

        Raises:
            `ValueError`: if their number differs from `num_image_features`, or if they cannot be found in
                `inputs_embeds` because the image token has no embedding.
        """
        if input_ids is not None:
            mask = input_ids == self.config.image_token_id
        elif self.config.image_token_id >= self.config.text_config.vocab_size:
            raise ValueError(
                "The image token has no embedding in this model, so its positions are unknown with `inputs_embeds`. "
                "Pass `input_ids`, or put the image features into `inputs_embeds` yourself and pass no images."
            )
        else:
            token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        if num_image_features is not None:
            num_tokens = mask.sum()
            torch_compilable_check(
                num_tokens == num_image_features,
                lambda: (
                    f"Image features and image tokens do not match, tokens: {int(num_tokens)}, features: "
                    f"{num_image_features}. Each image needs one `<image>` in the text, which the processor expands "
                    "to the image tokens. Do not truncate the text inside an image."
                ),
            )
        return mask

    @can_return_tuple
    def forward(  # type: ignore[misc]  # `TransformersKwargs` has `position_ids` too
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, VTLMMImageFeaturesOutput] | None = None,
        vision_features: torch.Tensor | None = None,
        always_run_vision: bool = False,
        output_image_token_mask: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VTLMMModelOutputWithPast:
        r"""
        Args:
            mm_encoder_outputs (`dict`, *optional*): `{"image": output of get_image_features}` instead of
                `pixel_values`. `generate` encodes the images once and passes this.
            vision_features (*optional*): instead of `pixel_values`, see [`~get_image_features`]. May contain 0 images.
            always_run_vision (`bool`, *optional*, defaults to `False`): whether to encode a blank image if the batch
                has no image, and add 0 times its features. With sharding, all processes must run the same modules.
            output_image_token_mask (`bool`, *optional*, defaults to `False`): whether to return `image_token_mask`.
            kwargs: arguments for the decoder, among them the cache (`past_key_values` up to transformers 5.23, `cache`
                from 5.24 on).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        image_outputs = (mm_encoder_outputs or {}).get("image")
        if sum(value is not None for value in (pixel_values, vision_features, image_outputs)) > 1:
            raise ValueError("Pass only one of `pixel_values`, `vision_features` and `mm_encoder_outputs`.")
        if inputs_embeds is None:
            inputs_embeds = self._embed(cast(torch.Tensor, input_ids))
        if pixel_values is not None or vision_features is not None:
            image_outputs = self.get_image_features(pixel_values, vision_features)
        elif image_outputs is None and always_run_vision:
            image_outputs = self.get_image_features(zero_image(self.config.vision_config, inputs_embeds.device))
            zero = 0.0 * image_outputs.image_features.sum()
            inputs_embeds = inputs_embeds + zero.to(inputs_embeds.device, inputs_embeds.dtype)
            image_outputs.pooler_output, image_outputs.image_features = [], image_outputs.image_features[:0]

        image_token_mask = None
        if image_outputs is not None:  # the image features replace the embeddings of the image tokens
            features = list(cast(list, image_outputs.pooler_output))  # empty without images
            features = features or [cast(torch.Tensor, image_outputs.image_features).flatten(0, 1)]
            decoder_input = torch.cat(features).to(inputs_embeds.device, inputs_embeds.dtype)
            image_token_mask = self.get_image_token_mask(input_ids, inputs_embeds, decoder_input.shape[0])
            inputs_embeds = inputs_embeds.masked_scatter(image_token_mask.unsqueeze(-1), decoder_input)

        outputs = self.language_model(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        outputs = {name: value for name, value in outputs.items() if name in DECODER_OUTPUTS}
        if not output_image_token_mask:
            image_token_mask = None
        return VTLMMModelOutputWithPast(**outputs, image_outputs=image_outputs, image_token_mask=image_token_mask)

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the input embeddings. At the image tokens, the image features replace them later."""
        # An image token outside the vocabulary has no embedding, so token 0 takes its place.
        if self.config.image_token_id >= self.config.text_config.vocab_size:
            input_ids = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
        return self.get_input_embeddings()(input_ids)


class VTLMMForConditionalGeneration(VTLMMPreTrainedModel, VTLMMGenerationMixin):
    r"""
    VT-LMM with its language modeling head. Predicts words at text positions and visual tokens at image positions.

    Attributes:
        visual_loss_function (callable): the visual loss of [`~loss_sums`], [`next_patch_loss`] by default. Assign
            another function to train with a different visual target.

    ```python
    >>> from transformers import AutoModelForImageTextToText, AutoProcessor
    >>> model = AutoModelForImageTextToText.from_pretrained(folder_or_id, trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained(folder_or_id, trust_remote_code=True)
    ```
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VTLMMConfig):
        super().__init__(config)
        self.model = VTLMMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.visual_loss_function: Callable[..., torch.Tensor] = next_patch_loss
        # The name of the embedding matrix depends on the decoder.
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> VTLMMImageFeaturesOutput:
        """See [`VTLMMModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @torch.no_grad()
    def get_visual_tokens(self, pixel_values: torch.Tensor, top_k: int = 5) -> VTLMMVisualTokensOutput:
        """Return the `top_k` most likely words of each patch under p = softmax(vm_head(v)), and their probabilities.

        `pixel_values` is a `torch.Tensor` of shape `(num_images, 3, height, width)`."""
        logits = self.model.vm_head(self.model.get_image_features(pixel_values).image_features)
        probabilities, token_ids = logits.float().softmax(-1).topk(top_k, dim=-1)
        return VTLMMVisualTokensOutput(token_ids=token_ids, probabilities=probabilities)

    @torch.no_grad()
    def initialize_vm_head(self, source: str = "lm_head") -> None:
        """
        Set the linear weight of the VM head to that of `"lm_head"` or `"input_embeddings"`, or to `"random"` values.

        A residual block is not changed. The paper does not specify the initialization.

        Raises:
            `ValueError`: if `source` is another value.
        """
        weight = self.model.vm_head.weight
        if source == "random":
            nn.init.normal_(weight, std=getattr(self.config.text_config, "initializer_range", 0.02))
        elif source in ("lm_head", "input_embeddings"):
            module = self.lm_head if source == "lm_head" else self.get_input_embeddings()
            weight.copy_(gathered_weight(module)[: self.config.visual_vocab_size])
        else:
            raise ValueError(f"The source is {source!r}, but must be 'lm_head', 'input_embeddings' or 'random'.")

    @can_return_tuple
    def forward(  # type: ignore[misc]  # `TransformersKwargs` has `position_ids` too
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, VTLMMImageFeaturesOutput] | None = None,
        output_visual_logits: bool = False,
        return_loss_sums: bool = False,
        visual_student: str | None = None,
        detach_visual_teacher: bool = True,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VTLMMCausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): one image token for each patch of
                each image.
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*): all images of the
                batch, in the order of their image tokens. A row may have several images or none.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): token ids, −100 at
                positions without a target. Image tokens are never targets.
            output_visual_logits (`bool`, *optional*): whether to return `visual_logits`.
            return_loss_sums (`bool`, *optional*): whether to return `loss_sums` instead of the logits, for training.
            visual_student, detach_visual_teacher: see [`~loss_sums`].
        """
        if return_loss_sums:
            kwargs["use_cache"] = False  # with a cache, packed rows would attend to each other
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            always_run_vision=return_loss_sums,
            output_image_token_mask=return_loss_sums or output_visual_logits,
            **kwargs,
        )
        if return_loss_sums:  # only the sums: mixed precision copies all outputs to float32
            sums = self.loss_sums(outputs, labels, attention_mask, position_ids, visual_student, detach_visual_teacher)
            return VTLMMCausalLMOutputWithPast(loss_sums=sums)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = visual_logits = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            targets = text_labels(labels, self.config.image_token_id, vocab_size)
            loss = self.loss_function(logits, targets, vocab_size=vocab_size, **kwargs)
        if output_visual_logits and outputs.image_token_mask is not None:
            visual_logits = self.model.vm_head(outputs.image_features).flatten(0, 1)
        outputs = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return VTLMMCausalLMOutputWithPast(loss=loss, logits=logits, visual_logits=visual_logits, **outputs)

    def loss_sums(
        self,
        outputs: VTLMMModelOutputWithPast,
        labels: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        visual_student: str | None = None,
        detach_visual_teacher: bool = True,
    ) -> dict[str, Any]:
        r"""
        Return the losses as sums over this batch. The trainer divides them by the counts of the whole optimizer step.

        Args:
            outputs ([`VTLMMModelOutputWithPast`]): the base model's output, with its `image_token_mask`.
            visual_student (`str`, *optional*): the head that the visual loss trains, `"vm_head"` (stage III) or
                `"lm_head"` (stage IV). The other head is the teacher. `None` means no visual loss.
            detach_visual_teacher (`bool`, *optional*, defaults to `True`): whether the teacher gets no gradient.

        Returns:
            `dict`: with `labels`, `lm_loss` (nats) and `num_lm_targets`. With `visual_student`, `visual_loss` (the
            value of `visual_loss_function`), `num_visual_targets` and the sums of [`visual_token_statistics`] as
            `visual_tokens`. A loss without targets is 0 and still has a graph. `token_losses` has the single losses in
            the order of the batch, as lists `lm` and `visual` of detached tensors `(N,)`, one for each VM head.
        """
        token_losses: dict[str, list] = {"lm": [], "visual": []}
        sums: dict[str, Any] = {"token_losses": token_losses}
        hidden_states = cast(torch.Tensor, outputs.last_hidden_state)
        if labels is not None:
            targets = text_labels(labels, self.config.image_token_id, self.config.text_config.vocab_size)
            targets = targets[:, 1:].to(hidden_states.device)
            is_target = targets != -100
            sums["lm_loss"] = fused_language_loss_sum(
                hidden_states[:, :-1][is_target], gathered_weight(self.lm_head), targets[is_target], token_losses["lm"]
            )
            sums["num_lm_targets"] = is_target.sum()
        if visual_student is not None:
            if visual_student not in ("vm_head", "lm_head"):
                raise ValueError(f"`visual_student` is {visual_student!r}; it must be 'vm_head' or 'lm_head'.")
            image_token_mask = cast(torch.Tensor, outputs.image_token_mask)
            positions = predicted_positions(image_token_mask, attention_mask, position_ids)
            image_side = image_predictions(self.model.vm_head, outputs, positions)  # p: visual tokens
            left_states = hidden_states[:, :-1][positions[:, 1:]]  # position n − 1 predicts patch n
            text_side = left_states, gathered_weight(self.lm_head)[: image_side[1].shape[0]]  # q
            student, teacher = (image_side, text_side) if visual_student == "vm_head" else (text_side, image_side)
            sums["visual_loss"] = self.visual_loss_function(
                *student,
                *teacher,
                detach_teacher=detach_visual_teacher,
                visual_student=visual_student,
                row_losses=token_losses["visual"],
                model=self,
                outputs=outputs,
                positions=positions,
            )
            sums["num_visual_targets"] = positions.sum()
            sums["visual_tokens"] = visual_token_statistics(*image_side, *text_side)
        return sums


__all__ = ["VTLMMForConditionalGeneration", "VTLMMModel", "VTLMMPreTrainedModel"]
