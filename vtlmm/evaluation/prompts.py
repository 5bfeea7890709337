# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""
LLaVA's prompts for the benchmarks of the paper, to the character (docs/Evaluation.md and llava/eval of
https://github.com/haotian-liu/LLaVA). A image and its line break stand before them; the chat template writes those.
"""

from string import ascii_uppercase


SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
# Benchmark → last lines of its prompt; MM-Vet asks its questions bare
ENDINGS = {
    "vqav2": SHORT,
    "gqa": SHORT,
    "vizwiz": f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}",
    "scienceqa": LETTER,
    "textvqa": SHORT,
    "pope": SHORT,
    "mmbench": LETTER,
    "mmbench_cn": "请直接回答选项字母。",
    "mmvet": "",
    "mme": SHORT,
}
# The longest answer that LLaVA lets a model write, in tokens
MAX_NEW_TOKENS = {name: 1024 if name.startswith(("scienceqa", "mmbench", "mmvet")) else 128 for name in ENDINGS}


def build_question(
    question: str, hint: str | None = None, options: list[str] | None = None, ocr_tokens: list[str] | None = None
) -> str:
    r"""
    A benchmark's question with what it brings along, as LLaVA writes it; [`build_prompt`] adds the ending.

    Args:
        question (`str`)
        hint (`str`, *optional*): of MMBench; for ScienceQA pass `f"Context: {context}"`.
        options (`list[str]`, *optional*): of MMBench and ScienceQA; they get the letters A, B, ….
        ocr_tokens (`list[str]`, *optional*): of TextVQA: the words that a reader of texts found in the image.
    """
    lines = [question] if hint is None else [hint, question]
    lines += [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options or [], strict=False)]
    if ocr_tokens is not None:
        lines.append(f"Reference OCR token: {', '.join(ocr_tokens)}")
    return "\n".join(lines)


def build_prompt(benchmark: str, question: str) -> str:
    """The question (of [`build_question`], where there is more than a question) with the ending of a benchmark.

    Raises:
        `ValueError`: for a benchmark that is not in `ENDINGS`."""
    if benchmark not in ENDINGS:
        raise ValueError(f"There is no prompt {benchmark!r}; there are {', '.join(ENDINGS)}.")
    return "\n".join(filter(None, [question, ENDINGS[benchmark]]))
