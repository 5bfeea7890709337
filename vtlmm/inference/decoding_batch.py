# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A batch of answers that are generated together, one token per step. Answers join and leave between the steps.

transformers' continuous batching (5.24) takes lists of token ids only, so it cannot read image features. Here, new
prompts go through `model.generate`, which stops after its first forward pass ([`start_batch`]). Then they join the
running batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, SuppressTokensLogitsProcessor
from transformers.cache_utils import DynamicLayer


@dataclass
class DecodingBatch:
    r"""
    Keys and values, attention mask and last logits of rows that are padded on the left.

    Attributes:
        cache ([`Cache`])
        attention_mask (`torch.Tensor` of shape `(batch_size, length)`): 1 at tokens, 0 at padding.
        logits (`torch.Tensor` of shape `(batch_size, vocab_size)`): of the next token.
        history (`list[torch.Tensor]`): prompt and answer of each row, for logits processors.
        processors (`list[LogitsProcessorList]`): of each row, as `generate` builds them from the generation config.
        cache_argument (`str`): name of the forward's argument for the cache: `cache`, `past_key_values` before
            transformers 5.24.
    """

    cache: Any
    attention_mask: torch.Tensor
    logits: torch.Tensor
    history: list[torch.Tensor]
    processors: list[Any]
    cache_argument: str

    def __len__(self) -> int:
        return len(self.attention_mask)

    @property
    def can_join(self) -> bool:
        """Whether other rows can join. Rows of a sliding window or a recurrent state cannot be padded."""
        return isinstance(self.cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in self.cache.layers)

    @property
    def needs_history(self) -> bool:
        """Whether logits processors read the tokens of their row. A list of suppressed tokens does not."""
        return any(type(processor) is not SuppressTokensLogitsProcessor for processor in self.processors[0])

    def scores(self) -> torch.Tensor:
        """Return the logits in float32 after the logits processors, `(batch_size, vocab_size)`."""
        scores = self.logits.to(torch.float32, copy=True)
        if not self.needs_history:  # all rows have the same processors
            return self.processors[0](self.attention_mask, scores)
        for i, processors in enumerate(self.processors):
            scores[i] = processors(self.history[i][None], scores[i : i + 1])[0]
        return scores

    def step(self, model, tokens: list[int]) -> None:
        """Add one token to each row, and compute the logits of the next one."""
        device = self.attention_mask.device
        input_ids = torch.tensor(tokens, device=device)[:, None]
        position_ids = self.attention_mask.sum(-1, keepdim=True)
        self.attention_mask = torch.cat([self.attention_mask, torch.ones_like(input_ids)], -1)
        if self.needs_history:
            self.history = [torch.cat(pair) for pair in zip(self.history, input_ids, strict=True)]
        outputs = model(
            input_ids=input_ids,
            attention_mask=self.attention_mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_argument: self.cache},
        )
        self.logits = outputs.logits[:, -1]

    def select(self, rows: list[int]) -> None:
        """Keep the given rows, in their order. A row may be given several times."""
        if rows == list(range(len(self))):
            return
        index = torch.tensor(rows, device=self.attention_mask.device)
        self.cache.reorder_cache(index)
        self.attention_mask, self.logits = self.attention_mask[index], self.logits[index]
        self.history = [self.history[i] for i in rows]
        self.processors = [self.processors[i] for i in rows]
        if self.can_join:
            self._remove_padding()

    def join(self, other: "DecodingBatch") -> None:
        """Add the rows of another batch. The shorter batch gets padding on the left."""
        length = max(self.attention_mask.shape[1], other.attention_mask.shape[1])
        for layer, new in zip(self.cache.layers, other.cache.layers, strict=True):
            for name in ("keys", "values"):
                parts = [pad_left(getattr(part, name), length, -2) for part in (layer, new)]
                setattr(layer, name, torch.cat(parts))
        masks = [pad_left(batch.attention_mask, length, -1) for batch in (self, other)]
        self.attention_mask = torch.cat(masks)
        self.logits = torch.cat([self.logits, other.logits])
        self.history += other.history
        self.processors += other.processors

    def _remove_padding(self) -> None:
        """Remove the positions at the start that are padding in all rows, so that a batch can become shorter again."""
        padding = int(self.attention_mask.argmax(-1).min())
        if padding:
            self.attention_mask = self.attention_mask[:, padding:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[..., padding:, :], layer.values[..., padding:, :]


def start_batch(model, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> DecodingBatch:
    r"""
    Return the batch of new prompts after their forward pass.

    Args:
        inputs (`dict`): from [`encoded_inputs`].
        max_new_tokens (`int`): longest answer in tokens, for a cache of fixed size.
    """
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
    return model.generate(**inputs, **settings, custom_generate=_first_forward)


def _first_forward(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """Run the forward pass of the prompts. [`~GenerationMixin.generate`] calls this instead of its decoding loop."""
    arguments = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    outputs = model(**arguments, return_dict=True)
    mask = model_kwargs.get("attention_mask")  # `generate` drops a mask without padding
    names = [name for name, value in model_kwargs.items() if isinstance(value, Cache)]
    return DecodingBatch(
        cache=model_kwargs[names[0]],
        attention_mask=torch.ones_like(input_ids) if mask is None else mask,
        logits=outputs.logits[:, -1],
        history=list(input_ids),
        processors=[logits_processor] * len(input_ids),
        cache_argument=names[0],
    )


def pad_left(tensor: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """Return the tensor with zeros before it, so that the dimension has the given length."""
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim)
