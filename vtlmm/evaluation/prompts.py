# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""
LLaVA's prompts for the benchmarks of the paper (docs/Evaluation.md and llava/eval of
https://github.com/haotian-liu/LLaVA). The chat template writes the image and its line break before them.
"""

from string import ascii_uppercase


SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
# Benchmark to the last lines of its prompt. MM-Vet has none.
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
# Longest answer in tokens, as in LLaVA
MAX_NEW_TOKENS = {name: 1024 if name.startswith(("scienceqa", "mmbench", "mmvet")) else 128 for name in ENDINGS}


def build_question(
    question: str, hint: str | None = None, options: list[str] | None = None, ocr_tokens: list[str] | None = None
) -> str:
    r"""
    Return a benchmark's question with its hint, options and OCR tokens, as LLaVA writes them, without the ending.

    Args:
        question (`str`)
        hint (`str`, *optional*): hint of MMBench; for ScienceQA pass `f"Context: {context}"`.
        options (`list[str]`, *optional*): options of MMBench and ScienceQA, which get the letters A, B, ….
        ocr_tokens (`list[str]`, *optional*): words of TextVQA that an OCR system read in the image.
    """
    lines = [question] if hint is None else [hint, question]
    lines += [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options or [], strict=False)]
    if ocr_tokens is not None:
        lines.append(f"Reference OCR token: {', '.join(ocr_tokens)}")
    return "\n".join(lines)


def check_prompt(benchmark: str | None) -> None:
    """
    Raises:
        `ValueError`: for a benchmark that is not in `ENDINGS`.
    """
    if benchmark is not None and benchmark not in ENDINGS:
        raise ValueError(f"Unknown prompt {benchmark!r}. Choose one of {', '.join(ENDINGS)}.")


def build_prompt(benchmark: str | None, question: str) -> str:
    """Return a question of [`build_question`] with the ending of a benchmark; without a benchmark, the question."""
    check_prompt(benchmark)
    return "\n".join(filter(None, [question, ENDINGS[benchmark]])) if benchmark else question


def remove_prompt(benchmark: str | None, prompt: str) -> str:
    """Return the question of a prompt from [`build_prompt`]."""
    return prompt.removesuffix(ENDINGS[benchmark]).removesuffix("\n") if benchmark and ENDINGS[benchmark] else prompt
