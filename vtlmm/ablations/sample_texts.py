# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Sample texts from a decoder, one in each line: `python -m vtlmm.ablations.sample_texts DECODER texts.txt`.

Their perplexity before and after training shows what the decoder forgets. Use held-out text instead if the decoder's
training data are available.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


@torch.no_grad()
def sample_texts(decoder: str, number: int = 256, max_new_tokens: int = 128, seed: int = 0) -> list[str]:
    r"""
    Return texts sampled at temperature 1, without line breaks. Empty texts are left out.

    Args:
        decoder (`str`): folder or Hub id.
        number (`int`, *optional*, defaults to 256): number of samples.
        max_new_tokens (`int`, *optional*, defaults to 128): longest text in tokens.
        seed (`int`, *optional*, defaults to 0)
    """
    set_seed(seed)
    tokenizer, model = AutoTokenizer.from_pretrained(decoder), AutoModelForCausalLM.from_pretrained(decoder)
    start = torch.full((number, 1), tokenizer.bos_token_id)
    samples = model.generate(start, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens)
    texts = [" ".join(text.split()) for text in tokenizer.batch_decode(samples, skip_special_tokens=True)]
    return [text for text in texts if text]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("decoder", help="folder or Hub id")
    parser.add_argument("output", type=Path, help="file for the texts")
    parser.add_argument("--number", type=int, default=256, help="number of samples")
    arguments = parser.parse_args()
    arguments.output.write_text("\n".join(sample_texts(arguments.decoder, arguments.number)) + "\n", encoding="utf-8")
