# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""VT-LMM (arXiv 2403.07720): a LLaVA-like model whose VM head maps each image feature to a distribution over words."""

import copy
from dataclasses import fields
from functools import partialmethod

import torch
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .configuration_vtlmm import VTLMMConfig
from .fused_losses_vtlmm import fused_language_loss_sum, fused_pseudo_image_features, fused_visual_loss_sum
from .layers_vtlmm import (
    VTLMMProjector,
    VTLMMVisualHead,
    VTLMMZeroLinear,
    gathered_weight,
    require_input_gradient,
    select_vision_features,
    skip_unused_layers,
    zero_image,
)
from .losses_vtlmm import predicted_positions, visual_loss_sum, visual_token_statistics
from .outputs_vtlmm import (
    VTLMMCausalLMOutputWithPast,
    VTLMMImageFeaturesOutput,
    VTLMMModelOutputWithPast,
    VTLMMVisualTokensOutput,
)


# What the decoder returns and we pass on; not, say, a mixture's `router_logits`.
DECODER_OUTPUTS = {field.name for field in fields(VTLMMModelOutputWithPast)}

# bitsandbytes matches these names against full module paths, so a bare "vision_tower" would match nothing.
UNQUANTIZED_MODULES = ("model.vision_tower", "model.multi_modal_projector", "model.vm_head", "lm_head")


class VTLMMPreTrainedModel(PreTrainedModel):
    config_class = VTLMMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The library's own default is ten times what the Hub asks for.
    save_pretrained = partialmethod(PreTrainedModel.save_pretrained, max_shard_size="5GB")
    push_to_hub = partialmethod(PreTrainedModel.push_to_hub, max_shard_size="5GB")

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, VTLMMZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def enable_input_require_grads(self):
        """Make the decoder's input embeddings require a gradient in each forward pass that trains the decoder."""
        self.disable_input_require_grads()
        decoder = self.base_model.language_model
        self._require_grads_hooks = [decoder.register_forward_pre_hook(require_input_gradient, with_kwargs=True)]

    def resize_token_embeddings(self, *args, **kwargs):
        """As in the base class. Words that are cut off the vocabulary are cut off the VM head too."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.visual_vocab_size = self.base_model.vm_head.truncate_vocabulary(self.config.text_config.vocab_size)
        return embeddings

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        As in the base class. By default, bitsandbytes quantizes the decoder only (see `UNQUANTIZED_MODULES`).

        Raises:
            `ValueError`: when the checkpoint lacks a tensor (it would be random, and the scores with it) and
            `output_loading_info`, which names what lacks, was not asked for.
        """
        quantization = kwargs.get("quantization_config")
        if isinstance(quantization, BitsAndBytesConfig) and quantization.llm_int8_skip_modules is None:
            quantization = copy.copy(quantization)
            quantization.llm_int8_skip_modules = [*UNQUANTIZED_MODULES]
            kwargs["quantization_config"] = quantization
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if output_loading_info:
            return model, info
        if info["missing_keys"] and pretrained_model_name_or_path is not None:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"The checkpoint lacks {len(missing)} tensors of {cls.__name__}, e.g. {', '.join(missing[:3])}. "
                "Use a complete VT-LMM folder (`vtlmm compose` or `vtlmm convert` make one)."
            )
        return model


class VTLMMModel(VTLMMPreTrainedModel):
    """Vision tower, projector, VM head and decoder, without the language modeling head."""

    def __init__(self, config: VTLMMConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = VTLMMProjector(config)
        self.vm_head = VTLMMVisualHead(config)
        self.language_model = AutoModel.from_config(config.text_config)
        skip_unused_layers(self.vision_tower, config)
        self.post_init()
        # CLIP and SigLIP name their text side's layers too, and FSDP stops where it finds none
        self._no_split_modules = {type(module).__name__ for module in self.modules()} & set(self._no_split_modules)

    def train(self, mode: bool = True):
        """As in torch, but a vision tower with nothing to learn stays in evaluation mode: dropout and batch-norm
        statistics of a frozen tower must not change."""
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
        Image features v = g(f(I)); with `config.use_pseudo_image_features` also ṽ = softmax(vm_head(v)) E.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`)
            vision_features (`torch.Tensor` of shape `(num_images, num_patches, vision_feature_size)`, *optional*):
                f(I) as `vision_feature_layer` selects it, instead of `pixel_values`: the tower is not called.
        """
        outputs = BaseModelOutput()
        if vision_features is None:
            if not kwargs.get("output_hidden_states"):
                kwargs["output_hidden_states"] = self.config.vision_feature_layers
            kwargs["return_dict"] = True
            outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), **kwargs)
            vision_features = select_vision_features(outputs, self.config)
        decoder_input = image_features = self.multi_modal_projector(vision_features)
        if self.config.use_pseudo_image_features:  # CODEPATH: the released vwPifLlama models
            decoder_input = self.get_pseudo_image_features(image_features)
        return VTLMMImageFeaturesOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=list(decoder_input),
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),
            vision_features=vision_features,
            image_features=image_features,
        )

    def get_pseudo_image_features(self, image_features: torch.Tensor) -> torch.Tensor:
        """ṽ = softmax(vm_head(v)) E, in the shape of `image_features` `(num_images, num_patches, hidden_size)`."""
        vm_weight, embeddings = gathered_weight(self.vm_head), gathered_weight(self.get_input_embeddings())
        mixed = self.vm_head.residual_block(image_features)
        pseudo = fused_pseudo_image_features(mixed.flatten(0, 1), vm_weight, embeddings[: vm_weight.shape[0]])
        return pseudo.view(*image_features.shape[:-1], -1)

    def get_image_token_mask(self, input_ids, inputs_embeds, num_image_features: int | None = None) -> torch.Tensor:
        r"""
        Where the image tokens are, `(batch_size, sequence_length)`.

        Raises:
            `ValueError`: when there are more or fewer of them than `num_image_features` (if given).
        """
        if input_ids is not None:
            mask = input_ids == self.config.image_token_id
        elif self.config.image_token_id >= self.config.text_config.vocab_size:
            raise ValueError(
                "The image token has no embedding in this model, so `inputs_embeds` do not say where the images go: "
                "pass `input_ids`, or put the image features into `inputs_embeds` yourself and pass no images."
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
                    f"{num_image_features}. Every image needs one `<image>` in its text (which the processor "
                    "expands), every `<image>` a image, and no text may be cut inside an image."
                ),
            )
        return mask

    @can_return_tuple
    def forward(
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
                `pixel_values`; `generate` encodes the images once and passes this.
            vision_features (*optional*): instead of `pixel_values`, see [`~get_image_features`]; may be of 0 images.
            always_run_vision (`bool`, *optional*, defaults to `False`): without images, encode one of zeros and add
                0 times the sum of its features, so that every process of a sharded run executes the same modules.
            output_image_token_mask (`bool`, *optional*, defaults to `False`): give `image_token_mask`.
            kwargs: for the decoder. The cache is among them: it is called `past_key_values` up to transformers 5.23
                and `cache` from 5.24 on, in the outputs too, and the decoder knows which.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            words = input_ids
            # CODEPATH: without a row of its own (any will do, the image features take its place) or with one (compose)
            if self.config.image_token_id >= self.config.text_config.vocab_size:
                words = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
            inputs_embeds = self.get_input_embeddings()(words)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if sum(given is not None for given in (pixel_values, vision_features, image_outputs)) > 1:
            raise ValueError("Pass only one of `pixel_values`, `vision_features` and `mm_encoder_outputs`.")
        if pixel_values is not None or vision_features is not None:
            image_outputs = self.get_image_features(pixel_values, vision_features)

        image_token_mask = None
        if image_outputs is not None:
            pooled = list(image_outputs.pooler_output) or [image_outputs.image_features.flatten(0, 1)]
            decoder_input = torch.cat(pooled).to(inputs_embeds.device, inputs_embeds.dtype)
            image_token_mask = self.get_image_token_mask(input_ids, inputs_embeds, decoder_input.shape[0])
            inputs_embeds = inputs_embeds.masked_scatter(image_token_mask.unsqueeze(-1), decoder_input)
        elif always_run_vision:
            image_outputs = self.get_image_features(zero_image(self.config, inputs_embeds.device))
            inputs_embeds = inputs_embeds + 0.0 * image_outputs.image_features.sum().to(inputs_embeds.dtype)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        outputs = {name: value for name, value in outputs.items() if name in DECODER_OUTPUTS}
        return VTLMMModelOutputWithPast(
            **outputs,
            image_outputs=image_outputs,
            image_token_mask=image_token_mask if output_image_token_mask else None,
        )


class VTLMMForConditionalGeneration(VTLMMPreTrainedModel, GenerationMixin):
    r"""
    VT-LMM with its language modeling head: words at text positions, visual tokens at image positions.

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
        # Decoders name their embedding matrix differently, so the tied pair is looked up.
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> VTLMMImageFeaturesOutput:
        """See [`VTLMMModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @torch.no_grad()
    def get_visual_tokens(self, pixel_values: torch.Tensor, top_k: int = 5) -> VTLMMVisualTokensOutput:
        r"""
        The `top_k` most likely words of every patch under p = softmax(vm_head(v)), with their probabilities.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`)
            top_k (`int`, *optional*, defaults to 5)
        """
        logits = self.model.vm_head(self.model.get_image_features(pixel_values).image_features)
        probabilities, token_ids = logits.float().softmax(-1).topk(top_k, dim=-1)
        return VTLMMVisualTokensOutput(token_ids=token_ids, probabilities=probabilities)

    @torch.no_grad()
    def initialize_vm_head(self, source: str = "lm_head"):
        r"""
        Start the VM head from `"lm_head"`, from the `"input_embeddings"`, or at `"random"` (normal, as every linear
        layer of the model). The paper does not say which it used.

        Raises:
            `ValueError`: for another source.
        """
        weight = self.model.vm_head.weight
        if source == "random":
            std = getattr(self.config.text_config, "initializer_range", 0.02)
            nn.init.normal_(weight, std=std)
        elif source in ("lm_head", "input_embeddings"):
            module = self.lm_head if source == "lm_head" else self.get_input_embeddings()
            weight.copy_(module.weight[: self.config.visual_vocab_size])
        else:
            raise ValueError(f"The VM head starts from lm_head, input_embeddings or random, not from {source!r}.")

    @can_return_tuple
    def forward(
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
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): with `image_token_id` once for
                every patch of every image.
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*): all images of the
                batch in the order of their image tokens; rows may have several, or none.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): −100 where there is no
                target.
            output_visual_logits (`bool`, *optional*): give `visual_logits`, (num_image_tokens, visual_vocab_size).
            return_loss_sums (`bool`, *optional*): the training path: no logits; `loss_sums` of [`~loss_sums`] instead.
            visual_student (`str`, *optional*): which head the visual loss teaches, `"vm_head"` or `"lm_head"`; without
                it there is no visual loss.
            detach_visual_teacher (`bool`, *optional*, defaults to `True`): whether the teacher is a constant.
        """
        if return_loss_sums:
            kwargs["use_cache"] = False  # with a cache, rows packed into one sequence would see each other
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
        if return_loss_sums:  # and nothing else, since mixed precision copies to float32 whatever leaves the model
            loss_sums = self.loss_sums(
                outputs, labels, attention_mask, position_ids, visual_student, detach_visual_teacher
            )
            return VTLMMCausalLMOutputWithPast(loss_sums=loss_sums)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = visual_logits = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        if output_visual_logits and outputs.image_token_mask is not None:
            visual_logits = self.model.vm_head(outputs.image_features).flatten(0, 1)
        outputs = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return VTLMMCausalLMOutputWithPast(loss=loss, logits=logits, visual_logits=visual_logits, **outputs)

    def loss_sums(
        self,
        outputs: VTLMMModelOutputWithPast,
        labels: torch.LongTensor | None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        visual_student: str | None = None,
        detach_visual_teacher: bool = True,
    ) -> dict[str, torch.Tensor]:
        r"""
        The losses as sums over this batch, to be divided by the counts of the whole optimizer step.

        Returns:
            `dict` with `lm_loss` (nats) and `num_lm_targets` when `labels` are given; with `visual_loss` (nats),
            `num_visual_targets` and the sums of [`visual_token_statistics`] under `visual_tokens` when there is a
            `visual_student`, with `vm_head_losses` of shape `(num_heads,)` when the model has several VM heads.
            Without a target a sum is 0, with a graph.
        """
        sums, hidden_states = {}, outputs.last_hidden_state
        if labels is not None:
            targets = labels[:, 1:].to(hidden_states.device)
            supervised = targets != -100
            sums["lm_loss"] = fused_language_loss_sum(
                hidden_states[:, :-1][supervised], gathered_weight(self.lm_head), targets[supervised]
            )
            sums["num_lm_targets"] = supervised.sum()
        if visual_student is not None:
            if visual_student not in ("vm_head", "lm_head"):
                raise ValueError(f"`visual_student` is {visual_student!r}; it must be 'vm_head' or 'lm_head'.")
            vm_heads = [self.model.vm_head, *getattr(self.model, "vm_head_candidates", ())]  # that a run compares
            sides = [self._visual_sides(head, outputs, attention_mask, position_ids) for head in vm_heads]
            student = ("vm_head", "lm_head").index(visual_student)
            visual_loss = fused_visual_loss_sum if detach_visual_teacher else visual_loss_sum
            losses = [visual_loss(*pair[student], *pair[1 - student]) for pair in sides]
            if len(losses) > 1:
                sums["vm_head_losses"] = torch.stack(losses)
            image_side, text_side = sides[0]
            sums["visual_loss"] = losses[0]
            sums["num_visual_targets"] = torch.tensor(image_side[0].shape[0], device=hidden_states.device)
            sums["visual_tokens"] = visual_token_statistics(*image_side, *text_side)
        return sums

    def _visual_sides(self, vm_head, outputs, attention_mask, position_ids):
        """What the visual loss compares, each with its head: features of patches, hidden states left of them."""
        vm_weight = gathered_weight(vm_head)
        lm_weight = gathered_weight(self.lm_head)[: vm_weight.shape[0]]
        hidden_states = outputs.last_hidden_state
        image_features = vm_head.residual_block(outputs.image_features).flatten(0, 1)
        if outputs.image_token_mask is None:  # the image of zeros of a text-only batch
            image_features, hidden_states = image_features[:0], hidden_states[0, :0]
        else:
            predicted = predicted_positions(outputs.image_token_mask, attention_mask, position_ids)
            image_features = image_features[predicted[outputs.image_token_mask]]
            hidden_states = hidden_states[:, :-1][predicted[:, 1:]]
        return (image_features, vm_weight), (hidden_states, lm_weight)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """For beams and several samples: the images of a row are repeated as a group, not one by one. Newer
        transformers encodes them before, and then there are no `pixel_values` here."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1:
            words = input_ids if input_ids.shape[1] else None  # empty when the prompt came as `inputs_embeds`
            patches = self.model.get_image_token_mask(words, model_kwargs.get("inputs_embeds")).sum(-1)
            per_row = (patches * pixel_values.shape[0] // patches.sum()).tolist()
            groups = [rows.repeat(expand_size, 1, 1, 1) for rows in pixel_values.split(per_row)]
            pixel_values = torch.cat(groups)
        inputs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        if pixel_values is not None:
            inputs[1]["pixel_values"] = pixel_values
        return inputs


__all__ = ["VTLMMForConditionalGeneration", "VTLMMModel", "VTLMMPreTrainedModel"]
