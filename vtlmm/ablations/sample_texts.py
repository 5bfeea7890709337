# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Texts that a decoder writes by itself, one a line: `python -m vtlmm.ablations.sample_texts DECODER texts.txt`.

Their perplexity under the decoder after training, beside that before, is what it forgot of its own language; for a
decoder whose training data are not at hand. Held-out text is the better yardstick where there is some.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


@torch.no_grad()
def sample_texts(decoder: str, number: int = 256, max_new_tokens: int = 128, seed: int = 0) -> list[str]:
    """`number` samples at temperature 1 from the whole distribution, each on one line; empty ones are left out."""
    set_seed(seed)
    tokenizer, model = AutoTokenizer.from_pretrained(decoder), AutoModelForCausalLM.from_pretrained(decoder)
    start = torch.full((number, 1), tokenizer.bos_token_id)
    written = model.generate(start, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens)
    texts = [" ".join(text.split()) for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    return [text for text in texts if text]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("decoder", help="folder or Hub id")
    parser.add_argument("output", type=Path, help="file of texts")
    parser.add_argument("--number", type=int, default=256)
    arguments = parser.parse_args()
    arguments.output.write_text("\n".join(sample_texts(arguments.decoder, arguments.number)) + "\n", encoding="utf-8")
