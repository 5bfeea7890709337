# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""The words of a vocabulary: their class, how to show them, and which of them name a label."""

import re
from dataclasses import dataclass
from functools import lru_cache

import torch


# English words of labels and captions that do not name anything in an image.
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
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
WORD_CLASSES = ("other", "function", "byte", "punctuation")
# Prefix of a token that begins a word: byte-level BPE, SentencePiece
WORD_STARTS = ("Ġ", "▁")
SUB_WORD_MARK = "-"  # shown before a token that continues a word


@dataclass(frozen=True)
class ShownWords:
    """
    How to show the words of a vocabulary to people.

    Args:
        texts (`list[str]`): Text of each token; a token that continues a word begins with a hyphen, as in `-ing`.
        is_whole (`list[bool]`): Whether the token begins a word and contains letters or digits.
        is_shown (`torch.BoolTensor` of shape `(V,)`): False for control tokens and characters, parts of characters and
            white space.
    """

    texts: list[str]
    is_whole: list[bool]
    is_shown: torch.Tensor


@lru_cache(maxsize=4)
def shown_words(tokenizer, vocab_size: int) -> ShownWords:
    """Return how to show the first `vocab_size` tokens of a tokenizer."""
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(list(range(vocab_size)))]
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
        tokenizer.all_special_ids
    )
    marks_starts = any(token.startswith(WORD_STARTS) for token in tokens)
    texts, is_whole, is_shown = [], [], []
    for i, (token, text) in enumerate(zip(tokens, vocabulary_words(tokenizer, vocab_size), strict=True)):
        hidden = i in control or not text or not text.isprintable() or _is_byte(text)
        names_something = any(character.isalnum() for character in text)
        continues = token.startswith("##") or (marks_starts and not token.startswith(WORD_STARTS))
        text = text.removeprefix("##")
        texts.append(SUB_WORD_MARK + text if continues and names_something else text)
        is_whole.append(names_something and not continues and not hidden)
        is_shown.append(not hidden)
    return ShownWords(texts, is_whole, torch.tensor(is_shown))


def vocabulary_words(tokenizer, vocab_size: int) -> list[str]:
    """Return each of the first `vocab_size` tokens as text without surrounding white space."""
    return [tokenizer.decode([i]).strip() for i in range(vocab_size)]


def _is_byte(text: str) -> bool:
    return "\ufffd" in text or BYTE.fullmatch(text) is not None


def word_classes(words: list[str], special_ids) -> torch.Tensor:
    """
    Return the class of each word as an index into `WORD_CLASSES`.

    White space and special tokens count as punctuation. A token that is only a part of a character is a byte.
    """

    def word_class(i: int, word: str) -> str:
        if i not in special_ids and _is_byte(word):
            return "byte"
        if i in special_ids or not any(character.isalnum() for character in word):
            return "punctuation"
        return "function" if word.lower() in FUNCTION_WORDS else "other"

    return torch.tensor([WORD_CLASSES.index(word_class(i, word)) for i, word in enumerate(words)])


def content_words(texts: list[str]) -> set[str]:
    """Return the words of labels or captions that name something, in lower case: no function words or letters."""
    words = {word for text in texts for word in WORD.findall(text.lower())}
    return {word for word in words if len(word) > 1 and word not in FUNCTION_WORDS}


def _forms(word: str) -> set[str]:
    """Return a word with its possible plural and singular forms."""
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
    Return the tokens of each label word: in any case, with or without a leading space, singular and plural.

    A word that the tokenizer splits into pieces gets no token, because its first piece also begins other words.

    Args:
        words (`list[str]`): The vocabulary from [`vocabulary_words`].
        wanted (`set[str]`): Label words in lower case.
    """
    tokens: dict[str, list[int]] = {}
    for i, word in enumerate(words):
        tokens.setdefault(word.lower(), []).append(i)
    return {word: sorted(i for form in _forms(word) for i in tokens.get(form, [])) for word in sorted(wanted)}


def whole_words(tokenizer, vocab_size: int) -> dict[str, int]:
    r"""
    Return the words of at least three lower-case letters that the tokenizer writes as one token, with their token ids.

    With a sub-word vocabulary these are the tokens that begin with a space ("Ġdog", "▁dog").

    Args:
        vocab_size (`int`): only the first `vocab_size` tokens count.
    """
    tokens = {token: i for token, i in tokenizer.get_vocab().items() if i < vocab_size}
    spaced = {token[1:]: i for token, i in tokens.items() if token[0] in "Ġ▁"}
    candidates = spaced or tokens
    return {word: i for word, i in sorted(candidates.items()) if re.fullmatch("[a-z]{3,}", word)}
