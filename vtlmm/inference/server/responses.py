# Copyright 2026 The VT-LMM authors. Licensed under the Apache License, Version 2.0.
"""Bodies and stream events of chat completions."""

import json
import time
import uuid
from typing import Any

from vtlmm.inference.answer_text import TokenTexts
from vtlmm.inference.sampling import TokenLogprob
from vtlmm.inference.scheduler import GenerationRequest, Piece


DONE = "data: [DONE]\n\n"


def event(body: dict) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Completion:
    r"""
    The reply to one request.

    Args:
        model (`str`): the model's name.
        request ([`GenerationRequest`])
        token_texts ([`TokenTexts`]): for log probabilities.
        include_usage (`bool`): whether a stream ends with the numbers of tokens.
    """

    def __init__(self, model: str, request: GenerationRequest, token_texts: TokenTexts, include_usage: bool = False):
        self.model, self.request, self.token_texts = model, request, token_texts
        self.include_usage = include_usage
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.num_tokens = 0
        self.num_finished = 0

    @property
    def is_finished(self) -> bool:
        return self.num_finished == self.request.num_answers

    def body(self, pieces: list[Piece]) -> dict[str, Any]:
        """Return the body of a reply that is not streamed, from the whole answers."""
        choices = []
        for piece in sorted(pieces, key=lambda piece: piece.index):
            self._count(piece)
            message = {"role": "assistant", "content": piece.text, "refusal": None}
            choices.append(
                {
                    "index": piece.index,
                    "message": message,
                    "logprobs": self._logprobs(piece.logprobs),
                    "finish_reason": piece.finish_reason,
                }
            )
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    def start(self) -> str:
        """Return the first events of a stream, one for each answer."""
        delta = {"role": "assistant", "content": ""}
        return "".join(self._chunk(index, delta, None, None) for index in range(self.request.num_answers))

    def chunk(self, piece: Piece) -> str:
        """Return the events for new text."""
        self._count(piece)
        events = ""
        if piece.text or piece.logprobs:
            events = self._chunk(piece.index, {"content": piece.text}, self._logprobs(piece.logprobs), None)
        if piece.finish_reason:
            events += self._chunk(piece.index, {}, None, piece.finish_reason)
        return events

    def end(self) -> str:
        """Return the last events of a stream."""
        if not self.include_usage:
            return DONE
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()}) + DONE

    def _count(self, piece: Piece) -> None:
        if piece.finish_reason:
            self.num_tokens += piece.num_tokens
            self.num_finished += 1

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, index: int, delta: dict, logprobs: dict | None, reason: str | None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.include_usage else {}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **usage})

    def _usage(self) -> dict[str, int]:
        prompt = self.request.num_tokens
        total = prompt + self.num_tokens
        return {"prompt_tokens": prompt, "completion_tokens": self.num_tokens, "total_tokens": total}

    def _logprobs(self, logprobs: list[TokenLogprob]) -> dict | None:
        if self.request.num_logprobs is None:
            return None
        content = [
            {
                **self._token(each.token, each.logprob),
                "top_logprobs": [self._token(token, logprob) for token, logprob in each.top],
            }
            for each in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_texts[token]
        # A token with a part of a character has no text of its own
        content = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": content}
