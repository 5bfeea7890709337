# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The words of a vocabulary: which are those of a label, and which say nothing."""

import re

import torch


# What a label or caption has beside words for what is seen. English only.
FUNCTION_WORDS = set(
    """
    a about after all also am an and any are as at be been before being both but by can could did do does for from
    had has have he her hers him his how i if in into is it its itself just may me might more most my no nor not of
    off on once one only or other our out over own shall she should so some such than that the their them then there
    these they this those through to too under until up very was we were what when where which while who whom why
    will with would yes you your
    """.split()
)
WORD = re.compile(r"[^\W_]+")
WORD_CLASSES = ("other", "function", "byte", "punctuation")


def vocabulary_words(tokenizer, vocab_size: int) -> list[str]:
    """Each of the first `vocab_size` words as text without the white space around it."""
    return [tokenizer.decode([i]).strip() for i in range(vocab_size)]


def word_classes(words: list[str], special_ids) -> torch.Tensor:
    """The class of each word of the vocabulary, as a place in `WORD_CLASSES`. Blanks and special tokens are
    punctuation, what is no whole character by itself is a byte."""

    def kind(i: int, word: str) -> str:
        if i not in special_ids and ("\ufffd" in word or re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", word)):
            return "byte"
        if i in special_ids or not any(character.isalnum() for character in word):
            return "punctuation"
        return "function" if word.lower() in FUNCTION_WORDS else "other"

    return torch.tensor([WORD_CLASSES.index(kind(i, word)) for i, word in enumerate(words)])


def content_words(texts: list[str]) -> set[str]:
    """The words of labels or captions that name something, in lower case: no function words, no single letters."""
    found = {word for text in texts for word in WORD.findall(text.lower())}
    return {word for word in found if len(word) > 1 and word not in FUNCTION_WORDS}


def _forms(word: str) -> set[str]:
    """A word, and what may be its plural or singular."""
    forms = {word, word + "s", word + "es"}
    if word.endswith("y"):
        forms.add(word[:-1] + "ies")
    if word.endswith("ies"):
        forms.add(word[:-3] + "y")
    if word.endswith("es"):
        forms.add(word[:-2])
    if word.endswith("s") and not word.endswith("ss"):
        forms.add(word[:-1])
    return {form for form in forms if len(form) > 1}


def label_ids(words: list[str], wanted: set[str]) -> dict[str, list[int]]:
    r"""
    The tokens that say each wanted word: in any case, with or without a blank before it, in plural and singular.

    A word that the vocabulary has in pieces only gets none: its first piece would stand for other words too.

    Args:
        words (`list[str]`): the vocabulary as [`vocabulary_words`] gives it.
        wanted (`set[str]`): in lower case.
    """
    tokens = {}
    for i, word in enumerate(words):
        tokens.setdefault(word.lower(), []).append(i)
    return {word: sorted(i for form in _forms(word) for i in tokens.get(form, [])) for word in sorted(wanted)}
