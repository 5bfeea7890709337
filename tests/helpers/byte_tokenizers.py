# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""A tokenizer with one token per byte, and a chat template for it."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(special=(), bos="<s>", eos="</s>", unk="<unk>", pad=None) -> PreTrainedTokenizerFast:
    """One token per byte, so that every text comes back from its ids; puts BOS in front when there is one."""
    named = [token for token in dict.fromkeys((unk, bos, eos, pad)) if token]
    words = [*named, *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, named.index(bos))])
        tokenizer.post_processor = template
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, unk_token=unk, pad_token=pad
    )
    fast.add_special_tokens({"extra_special_tokens": list(special)})
    return fast
