# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Turn the tokens of an answer into text while they are generated, and find stop strings."""


class AnswerText:
    r"""
    The text of an answer that grows token by token. It has no white space at its start and end.

    Args:
        tokenizer: of the model.
        stop (`tuple[str, ...]`): the answer ends before the first of these strings.

    Attributes:
        tokens (`list[int]`): token ids of the answer, without an end-of-sequence token.
        is_stopped (`bool`): whether a stop string was found.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self.is_stopped = False
        self._text = ""
        self._sent = 0  # characters of _text that were returned
        # The tokens before `_read` are in _text. Decoding starts at `_start`, because a token's text depends on the
        # tokens before it, and `_known` is the text of the tokens between the two.
        self._start = self._read = 0
        self._known = ""

    def decode(self, is_last: bool = False) -> None:
        """Decode the new tokens, and look for a stop string."""
        window = self.tokenizer.decode(self.tokens[self._start :], skip_special_tokens=True)
        # A character of several tokens is decoded as U+FFFD until its last token is there
        if len(window) <= len(self._known) or (window.endswith("\ufffd") and not is_last):
            return
        before = len(self._text)
        self._text += window[len(self._known) :]
        self._start, self._read = self._read, len(self.tokens)
        self._known = self.tokenizer.decode(self.tokens[self._start :], skip_special_tokens=True)
        positions = [self._text.find(stop, max(before - len(stop) + 1, 0)) for stop in self.stop]
        if any(position >= 0 for position in positions):
            self._text = self._text[: min(position for position in positions if position >= 0)]
            self.is_stopped = True

    def new_text(self) -> str:
        """Return the text since the last call that later tokens cannot change."""
        end = len(self._text) - self._possible_stop()
        return self._take(len(self._text[:end].rstrip()))

    def finish(self) -> str:
        """Return the text that was not returned before."""
        if not self.is_stopped:
            self.decode(is_last=True)
        return self._take(len(self._text.rstrip()))

    @property
    def text(self) -> str:
        """The whole text, without white space around it."""
        return self._text.strip()

    def _take(self, end: int) -> str:
        if not self._text[: self._sent].strip():
            self._sent = len(self._text) - len(self._text.lstrip())
        piece = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _possible_stop(self) -> int:
        """Return the length of the longest end of the text with which a stop string begins."""
        if self.is_stopped:
            return 0
        longest = min(max(map(len, self.stop), default=1) - 1, len(self._text))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._text[-length:]) for stop in self.stop):
                return length
        return 0


class TokenTexts:
    """The text of single tokens inside an answer: with the space before a word."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._before = tokenizer.decode(self._anchor)
        self._texts: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([*self._anchor, token])[len(self._before) :]
        return self._texts[token]
