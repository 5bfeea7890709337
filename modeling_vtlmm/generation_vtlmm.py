# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Generation from prompts with image tokens, whose id may be outside the vocabulary of `lm_head`."""

import torch
import torch.nn.functional as F
from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    PromptLookupCandidateGenerator,
    SuppressTokensLogitsProcessor,
)

from .configuration_vtlmm import VTLMMConfig


# Logits processors that look up the ids of the prompt in the scores.
PROMPT_PROCESSORS = (EncoderNoRepeatNGramLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor)


class _WithImageTokenScore(LogitsProcessor):
    """Run a logits processor on scores with an extra column for the image token, and drop the column afterwards."""

    def __init__(self, processor: LogitsProcessor, image_token_id: int):
        self.processor, self.image_token_id = processor, image_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        vocab_size = scores.shape[-1]
        num_columns = self.image_token_id + 1 - vocab_size
        return self.processor(input_ids, F.pad(scores, (0, num_columns), value=-float("inf")))[..., :vocab_size]


class VTLMMGenerationMixin(GenerationMixin):
    """transformers' generation for several images per row and for image tokens outside the vocabulary."""

    config: VTLMMConfig

    def _image_token_is_in_vocabulary(self) -> bool:
        return self.config.image_token_id < self.config.text_config.vocab_size

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeat the images of each row as a group, for beam search and several samples per prompt."""
        # None since transformers 5.24, which encodes the images before this call
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1:
            prompt_ids = input_ids if input_ids.shape[1] else None  # empty if the prompt is given as `inputs_embeds`
            patches = self.model.get_image_token_mask(prompt_ids, model_kwargs.get("inputs_embeds")).sum(-1)
            per_row = (patches * pixel_values.shape[0] // patches.sum()).tolist()
            groups = [images.repeat(expand_size, 1, 1, 1) for images in pixel_values.split(per_row)]
            pixel_values = torch.cat(groups)
        inputs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        if pixel_values is not None:
            inputs[1]["pixel_values"] = pixel_values
        return inputs

    def _get_logits_processor(self, *args, **kwargs):
        """Return the base class's processors. Processors that look up prompt ids get a score for the image token."""
        processors = super()._get_logits_processor(*args, **kwargs)
        if not self._image_token_is_in_vocabulary():
            for i, processor in enumerate(processors):
                if isinstance(processor, PROMPT_PROCESSORS):
                    processors[i] = _WithImageTokenScore(processor, self.config.image_token_id)
        return processors

    def _get_candidate_generator(self, *args, **kwargs):
        """Return the base class's candidate generator. Prompt lookup never proposes an image token."""
        generator = super()._get_candidate_generator(*args, **kwargs)
        if isinstance(generator, PromptLookupCandidateGenerator) and not self._image_token_is_in_vocabulary():
            image_token_id = self.config.image_token_id
            suppress = SuppressTokensLogitsProcessor([image_token_id], device=self.device)
            generator.vocab_size = image_token_id + 1
            generator.logits_processor = LogitsProcessorList([*(generator.logits_processor or []), suppress])
        return generator
